"""Bandwidth: real ranks once, and judgements of what ranks may say. The whole verb, on this machine."""

import json
import subprocess
import sys
import time

import pytest

from recap_ds.cli.main import main
from recap_ds.doctor import network
from recap_ds.doctor.bandwidth import MARK, Bandwidth
from tests.doctor.made_facts import facts

GOOD = Bandwidth(16, 512.0, 90.0, 80.0, True)


def said(result: Bandwidth) -> list[str]:
    return [f"[INFO] starting\nnode-0: {MARK}{json.dumps(result._asdict())}\n[INFO] done"]


@pytest.mark.parametrize(
    ("outputs", "level", "what"),
    [
        (said(GOOD), "ok", "16 ranks, 512 MB: all-reduce 90.00 GB/s, all-gather 80.00 GB/s"),
        (said(GOOD._replace(all_gather_gb_per_second=1.0)), "warn", "5 would be little"),
        (said(GOOD._replace(correct=False)), "fail", "WRONG"),
        (["a: starting\na: RuntimeError: no route\na: bye"], "fail", "RuntimeError: no route"),
        (["no end within 210 s"], "fail", "no end within 210 s"),
        ([""], "fail", "did not get through"),
    ],
)
def test_what_ranks_say_is_judged(outputs, level, what):
    (finding,) = network._judge("nodes", outputs, 5.0, "mend")
    assert finding.level == level and what in finding.what


def test_one_accelerator_has_nobody_to_talk_to():
    one = facts(accelerator=facts().accelerator | {"count": 1})
    assert network.local_bandwidth_findings(one)[0].level == "ok"


def test_ranks_that_never_end_are_ended(monkeypatch):
    monkeypatch.setattr(network, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(network, "START_SECONDS", 0.0)
    process = network._start([sys.executable, "-c", "import time; time.sleep(600)"], {})
    start = time.monotonic()
    (output,) = network._outputs([process])
    assert "no end within" in output and process.returncode is not None and time.monotonic() - start < 60


def test_the_doctor_writes_a_page(tmp_path):
    command = [sys.executable, "-m", "recap_ds.cli.main", "doctor", "--run-folder", str(tmp_path)]
    done = subprocess.run([*command, "--shards", str(tmp_path / "no")], capture_output=True, text=True, timeout=300)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "" and list(tmp_path.iterdir()) == []
    subjects = {line[:25].split(maxsplit=1)[1].strip(): line.split()[0] for line in lines}
    assert subjects["local ranks"] == "ok" and subjects["shards"] == "fail" and subjects["packages"] in ("ok", "warn")
    assert last.endswith(", 1 fail") and sum(map(int, last.replace(",", "").split()[::2])) == len(lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hostfile", "nowhere"], "--hostfile nowhere: cannot be read"),
        (["--config", "nowhere"], "--config nowhere: cannot be read"),
        (["--fast"], "--fast"),
    ],
)
def test_wrong_arguments_end_in_one_line(words, said, capsys):
    assert main(["doctor", *words]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and said in line and captured.out == ""
