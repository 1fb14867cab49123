"""Judgements of one machine, from facts that were made up; and the facts of this one."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from recap_ds.doctor import machine
from recap_ds.doctor.node import NodeFacts
from recap_ds.doctor.page import Finding, closing_line, exit_code
from tests.doctor.made_facts import CPU, facts

GIB = 2**30


def levels(findings):
    return [finding.level for finding in findings]


def test_a_good_machine_has_nothing_to_mend():
    assert set(levels(machine.machine_findings(facts(), cpus_per_rank=3))) == {"ok"}


def test_packages_outside_their_range_are_named_with_both():
    versions = facts().versions | {"deepspeed": "0.18.0", "peft": None}
    deepspeed, peft = machine.version_findings(facts(versions=versions))
    assert (deepspeed.level, peft.level) == ("fail", "fail")
    assert "deepspeed 0.18.0 is outside <0.20,>=0.19.8" in deepspeed.what and "pip install" in deepspeed.mend
    assert "peft is missing" in peft.what


@pytest.mark.parametrize(
    ("torch", "level"), [("2.13.0+cu128", "ok"), ("2.13.1", "ok"), ("2.12.0", "warn"), ("2.130", "fail")]
)
def test_another_release_than_the_tested_is_worth_a_word(torch, level):
    found = machine.version_findings(facts(versions=facts().versions | {"torch": torch}))
    assert levels(found) == [level]


def test_a_package_that_was_never_installed_fails():
    (found,) = machine.version_findings(facts(requirements={}, versions={}))
    assert found.level == "fail" and "pip install -e ." in found.mend


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({}, "ok", "8 x A100"),
        ({"count": 0}, "fail", "sees no device"),
        ({"bf16": False}, "warn", "no bf16"),
        (CPU | {"chosen": False}, "warn", "runs on the CPU"),
        (CPU | {"chosen": True}, "ok", "as DS_ACCELERATOR says"),
    ],
)
def test_accelerators(change, level, said):
    found = machine.accelerator_finding(facts(accelerator=facts().accelerator | change))
    assert found.level == level and said in found.what


@pytest.mark.parametrize(("gib", "level"), [(64, "ok"), (4, "warn"), (0.0625, "fail"), (0, "fail")])
def test_shared_memory_is_a_gib_per_rank(gib, level):
    assert machine.shared_memory_finding(facts(shared_memory_bytes=int(gib * GIB))).level == level


def test_few_cores_are_a_warning():
    assert machine.cores_finding(facts(cpus=24), cpus_per_rank=3).level == "ok"
    assert machine.cores_finding(facts(cpus=23), cpus_per_rank=3).level == "warn"


def test_limits_each_get_their_line_and_minus_one_is_none():
    low = {"open_files": 1024, "processes": 1000, "locked_bytes": 2**23}
    found = machine.limit_findings(facts(limits=low))
    assert levels(found) == ["warn"] * 3 and "ulimit -l unlimited" in found[2].mend
    assert levels(machine.limit_findings(facts(limits=low | {"open_files": -1, "processes": -1}, infiniband=[]))) == [
        "ok"
    ]


def test_infiniband_that_is_switched_off_is_a_warning():
    assert machine.network_variables_finding(facts(variables={"NCCL_IB_DISABLE": "1"})).level == "warn"
    assert machine.network_variables_finding(facts(variables={"NCCL_IB_DISABLE": "1"}, infiniband=[])).level == "ok"


def test_programs_are_needed_as_far_as_they_are_used():
    without = facts(programs={"deepspeed": True, "pdsh": False, "ssh": True})
    assert levels(machine.launcher_findings(without, with_hosts=False)) == ["ok"]
    (found,) = machine.launcher_findings(without, with_hosts=True)
    assert found.level == "fail" and "pdsh" in found.what


def test_the_page_counts_and_decides():
    page = [Finding("ok", "a", "fine"), Finding("warn", "b", "two\nlines", "mend it")]
    assert str(page[1]) == f"warn  {'b':<18} two lines; mend it"
    assert closing_line(page) == "1 ok, 1 warn, 0 fail" and exit_code(page) == 0
    assert exit_code([*page, Finding("fail", "c", "broken")]) == 1


def test_a_machine_tells_its_facts_in_one_line(tmp_path):
    command = [sys.executable, "-m", "recap_ds.doctor.node", str(tmp_path), str(tmp_path / "absent")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    told = NodeFacts.from_output(f"Welcome\n{done.stdout}Bye\n")
    assert told.versions["deepspeed"] == version("deepspeed") and told.requirements["deepspeed"].count("0.19.8")
    assert told.cpus == len(os.sched_getaffinity(0)) and told.accelerator["backend"] == "gloo"
    assert told.paths == {str(tmp_path): True, str(tmp_path / "absent"): False}
    assert told.variables["NCCL_DEBUG"] == "INFO" and "secret" not in done.stdout
