"""Hostfiles and other machines: ``ssh`` is a stub that stays here, so that every way of failing can be played."""

import os
import sys
from pathlib import Path

import pytest

from recap_ds.doctor.hosts import Answer, Host, ask_hosts, host_findings, read_hostfile
from recap_ds.doctor.node import NodeFacts
from recap_ds.errors import UsageError
from tests.doctor.made_facts import CPU, facts

HOST = Host("node-1", 8)


def hostfile(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    from tests.distributed.harness import REPOSITORY

    assert read_hostfile(hostfile(tmp_path, "# nodes\n\n  b slots=2 \na\tslots=16\n")) == [Host("b", 2), Host("a", 16)]
    assert read_hostfile(REPOSITORY / "launch" / "hostfile.example")[0] == Host("node-0", 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\nb\n", "line 2: 'b' is not like"),
        ("a slots=0\n", "line 1"),
        ("a slots=2 b slots=2\n", "line 1"),
        ("a slots=2\na slots=4\n", "line 2: 'a' is listed twice"),
        ("-oProxyCommand=x slots=2\n", "line 1"),
        ("# nobody\n", "names no machine"),
        ("node[0-3] slots=8\n", "line 1"),
        ("a,b slots=8\n", "line 1"),
    ],
)
def test_wrong_hostfiles_are_refused_with_the_line(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        read_hostfile(hostfile(tmp_path, text))


def test_a_hostfile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere: cannot be read"):
        read_hostfile(tmp_path / "nowhere")


def judged(there: NodeFacts, clock: float = 0.0):
    return [(finding.level, finding.what) for finding in host_findings(Answer(HOST, there, clock, None), facts())]


def test_a_machine_like_this_one_is_one_ok_line():
    assert judged(facts(hostname="node-1", paths={"/runs/token": True})) == [
        ("ok", "node-1: reached, 8 x A100, same packages, source and paths")
    ]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (facts(versions=facts().versions | {"torch": "2.12.0"}), "torch 2.12.0 (2.13.0+cu128 on node-0)"),
        (facts(python="3.10.1"), "Python 3.10.1 (3.12.3 on node-0)"),
        (facts(source="ffff"), "recap_ds's source is another there"),
        (facts(accelerator=facts().accelerator | {"count": 7}), "7 accelerator(s), the hostfile says slots=8"),
        (facts(accelerator=facts().accelerator | CPU), "its accelerator is cpu, cuda on node-0"),
        (facts(paths={"/runs/token": False, "/data": True}), "does not see /runs/token"),
    ],
)
def test_what_differs_fails_with_both_sides(there, said):
    ((level, what),) = judged(there)
    assert level == "fail" and what.startswith("node-1: ") and said in what


def test_a_clock_that_is_off_is_a_warning():
    assert judged(facts(), clock=-90.0)[1:] == [("warn", "node-1: its clock is -90 s off")]
    assert [level for level, _ in judged(facts(), clock=4.0)] == ["ok"]


def test_a_slow_answer_is_no_wrong_clock(ssh):
    ssh(f"""now=$(date +%s.%N); sleep 1; echo '{facts(time=0.25).to_line()}' | sed "s/0\\.25/$now/" """)
    (answer,) = ask_hosts([HOST], [], {})
    assert answer.clock_seconds == 0.0


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Makes ``ssh OPTIONS HOST COMMAND`` a shell script of the test's."""

    def install(script: str) -> None:
        path = tmp_path / "bin" / "ssh"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\nhost=${{@: -2:1}} command=${{@: -1}}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return install


def test_machines_are_asked_in_the_order_of_the_hostfile(ssh, tmp_path, monkeypatch):
    line = facts(hostname="$host", time=0.0).to_line().replace('"', '\\"')
    ssh(f'[[ $host == slow ]] && sleep 0.5\necho Welcome to $host\necho "{line}"\necho "$command" >>{tmp_path}/asked')
    odd = tmp_path / "a folder; $x"
    odd.mkdir()
    monkeypatch.chdir(odd)
    answers = ask_hosts([Host("slow", 1), Host("quick", 2)], [odd / "token"], {"A": "b c"})
    assert [(answer.host.name, answer.facts.hostname) for answer in answers] == [("slow", "slow"), ("quick", "quick")]
    assert all(answer.clock_seconds < -1e9 for answer in answers)
    (asked,) = set((tmp_path / "asked").read_text().splitlines())
    assert asked == f"cd '{odd}' && env 'A=b c' {sys.executable} -m recap_ds.doctor.node '{odd}/token'"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255', "ssh failed: ssh: connect"),
        ("echo No module named recap_ds >&2; exit 1", "recap_ds does not run there: No module named recap_ds"),
        ("exit 3", "nothing was said"),
    ],
)
def test_machines_that_do_not_answer_say_why(ssh, script, said):
    ssh(script)
    (answer,) = ask_hosts([HOST], [], {})
    (finding,) = host_findings(answer, facts())
    assert finding.level == "fail" and said in finding.what and finding.what.startswith("node-1: ") and finding.mend


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo Welcome", "it said: Welcome"),
        ("true", "it said: nothing"),
        ('echo \'RECAP_DS_NODE {"hostname": "node-1"}\'', "another version"),
        ("echo 'RECAP_DS_NODE {'", "no answer that is understood"),
    ],
)
def test_machines_whose_answer_is_not_understood_fail(ssh, script, said):
    ssh(script)
    (answer,) = ask_hosts([HOST], [], {})
    (finding,) = host_findings(answer, facts())
    assert finding.level == "fail" and said in finding.what
