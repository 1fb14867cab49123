"""``recap-ds bench resume``: that it measures what it says. Its seconds are this machine's and are not judged."""

import json
import os
import subprocess
import sys

import pytest

from recap_ds.bench.resume import bench_resume
from recap_ds.cli.main import main
from recap_ds.errors import UsageError
from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY


def test_it_prints_one_line_of_json(tmp_path):
    """In a process of its own: it joins a process group and leaves it."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    command = [sys.executable, "-m", "recap_ds.cli.main", "bench", "resume", "--parameters", "2M", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=REPOSITORY,
        env={**environment, "DS_ACCELERATOR": "cpu", "PATH": str(tmp_path)},  # no compiler
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert figures["bench"] == "resume" and figures["parameters"] == 2 * 2**20 and figures["repeats"] == 2
    # Master, two moments and the average in float32, and a header.
    assert 0 < figures["bytes"] - 16 * figures["parameters"] < 10_000
    assert figures["equal"] is True
    assert figures["background_stall_seconds"] <= figures["background_written_seconds"]
    assert all(figures[name] > 0 for name in figures if name.endswith("_seconds"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_built(tmp_path):
    with pytest.raises(UsageError, match=rf"--folder {tmp_path}: .* GB are free and 6400000.0 GB are needed"):
        bench_resume(10**14, 1, tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        bench_resume(10**6, 1, tmp_path / "nowhere")


@pytest.mark.parametrize(("flag", "value"), [("--parameters", "many"), ("--parameters", "3"), ("--repeats", "0")])
def test_counts_without_sense_end_in_one_line(flag, value, capsys):
    assert main(["bench", "resume", flag, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag} {value}: give a count" in line
