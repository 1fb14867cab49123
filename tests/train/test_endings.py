"""Every way a launched run can end: exit code, what it leaves behind, and what the log says first.

Two runs of two ranks, each befallen by one thing after another (faulty_train.py) and started again.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from recap_ds.checkpoint.layout import step_folders
from recap_ds.checkpoint.record import verify_checkpoint
from recap_ds.envs.scripted import write_reach_shards
from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY, free_port
from tests.train.faulty_train import VARIABLE

NUM_STEPS = 100_000  # never reached
SETTINGS = (
    "model.image_size=32",
    "training.batch_size=2",
    "training.global_batch_size=4",
    f"training.num_training_steps={NUM_STEPS}",
    "data.num_workers=0",
    "data.held_out_fraction=0",
    "checkpoint.save_every_steps=2",
    "checkpoint.keep_last=9",
    "logging.every_steps=1000",
    "logging.wandb=disabled",
)


class Ending(NamedTuple):
    code: int
    lines: list[str]  # of the program, without the launcher's
    failures: dict[str, str]  # rank_N.txt -> its text
    steps: list[int]  # of checkpoints that verify

    @property
    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith("error: ")]

    def line(self, beginning: str) -> str:
        (line,) = [line for line in self.lines if line.startswith(beginning)]
        return line


def launch(folder: Path, fault: str, *settings: str) -> Ending:
    """Through the ``deepspeed`` launcher, to the end of all that it started: its output is closed then."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", VARIABLE: fault, "PYTHONPATH": str(REPOSITORY)}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    program = [str(REPOSITORY / "tests" / "train" / "faulty_train.py"), "--deepspeed"]
    done = subprocess.run(
        [*launcher, *program, str(REPOSITORY / "ds_configs" / "zero3.json"), *SETTINGS, *settings],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    run = folder / "runs" / "quickstart"
    whole = [step for step, path in step_folders(run / "checkpoints").items() if not verify_checkpoint(path)]
    failures = {path.name: path.read_text() for path in sorted((run / "failures").glob("*.txt"))}
    return Ending(done.returncode, [line for line in done.stdout.splitlines() if line[:1] != "["], failures, whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    write_reach_shards(root / "shards", num_demo=4, num_auto=4, num_intervention=2, size=32)
    return root


@pytest.fixture(scope="module")
def stops(folder) -> dict[str, Ending]:
    """A run stopped by a signal to one rank; started again, stopped by the end of its launcher alone."""
    (folder / "stops").mkdir()
    shards = f"data.shards={folder / 'shards'}"
    return {fault: launch(folder / "stops", fault, shards) for fault in ("usr1 3 1", "launcher 7 0")}


@pytest.fixture(scope="module")
def limits(folder) -> dict[str, Ending]:
    """A run stopped by a file; started again, stopped by the end of its time."""
    (folder / "limits").mkdir()
    shards = f"data.shards={folder / 'shards'}"
    return {
        "file": launch(folder / "limits", "file 2 0", shards),
        "time": launch(folder / "limits", "nothing 0", shards, "training.max_wall_minutes=0.01"),
    }


@pytest.fixture(scope="module")
def failures(folder) -> dict[str, Ending]:
    """A run that loses its first rank; started again, its memory does not suffice; again, it hangs."""
    (folder / "failures").mkdir()
    shards = f"data.shards={folder / 'shards'}"
    return {fault: launch(folder / "failures", fault, shards) for fault in ("kill 3 0", "oom 3 1", "hang 4 1")}


def check_stopped(ending: Ending, why: str, at_least: int) -> None:
    line = ending.line("stopped at step ")
    step = int(line.split()[3])
    assert line == (
        f"stopped at step {step} of {NUM_STEPS} ({why}): runs/quickstart/checkpoints/step_{step:08d}; "
        "the same command goes on from there"
    )
    assert step >= at_least and ending.steps[-1] == step, "saved where it stopped, and whole"
    assert not ending.errors and not any("Traceback" in line for line in ending.lines)
    assert not ending.failures


def test_a_signal_to_one_rank_stops_all_at_one_step_with_code_75(stops):
    ending = stops["usr1 3 1"]
    assert ending.code == 75, "through the deepspeed launcher"
    # It came before the fourth step ended; a step later all know.
    check_stopped(ending, "SIGUSR1", 5)


def test_ranks_whose_launcher_was_killed_save_and_leave(stops):
    ending = stops["launcher 7 0"]
    assert ending.code == -signal.SIGTERM, "the launcher's own end"
    before = stops["usr1 3 1"].steps[-1]
    assert ending.line("continuing ") == f"continuing runs/quickstart at step {before}"
    check_stopped(ending, "its launcher has ended", 8)


def test_a_file_in_the_run_folder_stops_it(limits):
    ending = limits["file"]
    assert ending.code == 75
    check_stopped(ending, "the stop file", 3)


def test_the_end_of_its_time_stops_it(limits):
    ending = limits["time"]
    assert ending.code == 75
    before = limits["file"].steps[-1]
    assert ending.line("continuing ") == f"continuing runs/quickstart at step {before}", "the file is gone"
    check_stopped(ending, "training.max_wall_minutes", before + 1)


def test_a_killed_rank_takes_the_job_down_in_one_line(failures):
    ending = failures["kill 3 0"]
    assert ending.code != 0
    assert ending.errors == [
        "error: rank 1: lost rank 0: ended without a word: killed, or out of host memory? Its node's and scheduler's "
        "log may know; more in runs/quickstart/failures"
    ]
    assert not any("Traceback" in line for line in ending.lines), "what collectives say of it is in a file"
    assert "rank_1.txt" in ending.failures and ending.steps == [2]


def test_a_rank_out_of_memory_says_what_to_change_before_anybody_else_speaks(failures):
    ending = failures["oom 3 1"]
    assert ending.code == 1
    first, second = ending.errors
    assert first == (
        "error: rank 1: out of memory: lower training.batch_size (now 2): the result stays the same, or set "
        "training.activation_checkpointing=true (now false), or use ds_configs/zero3_offload.json (the optimizer is "
        "not offloaded now) (step 4); see runs/quickstart/failures/rank_1.txt"
    )
    assert second.startswith("error: rank 0: lost rank 1: out of memory: ")
    assert not any("Traceback" in line for line in ending.lines)
    written = ending.failures["rank_1.txt"]
    assert "OutOfMemoryError: tried to allocate 2.00 GiB" in written and "peak resident set: " in written
    assert ending.steps == [2]


def test_a_hang_leaves_the_stacks_of_every_rank(failures):
    ending = failures["hang 4 1"]
    assert ending.code == 1
    assert ending.errors[0] == (
        "error: rank 0: nothing moved for 2 s (training.hang_timeout_seconds) since: step 5; "
        "stacks of every rank are in runs/quickstart/failures"
    )
    waiting, hanging = (ending.failures[f"rank_{rank}.txt"].rpartition("===")[2] for rank in (0, 1))
    assert "nothing moved" in waiting and "in take_step" in waiting
    assert "nothing moved" in hanging and "in befall" in hanging
    assert ending.steps == [2, 4]
