"""slurm.sbatch under a stub of Slurm: real ranks meet, and the exit code decides whether the job is queued again.

The stub ``srun`` does what the sbatch file counts on: a task per rank with Slurm's names in its environment, and the
largest exit code of any of them. ``scontrol`` writes down what it was asked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY

SRUN = """#!{python}
import json, os, subprocess, sys
start = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
options, command = sys.argv[1:start], sys.argv[start:]
with open("srun.jsonl", "a") as file:
    print(json.dumps(options), file=file)
tasks = []
for rank in range(2):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
    print(json.dumps({{"pid": tasks[-1].pid}}), flush=True)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; echo other; else echo "$@" >>scontrol; fi
"""
# A task that tells who it is; rank 1 ends as CODES says, a line for each try.
TASK = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FROM_FILE")
facts = {"pid": os.getpid(), "words": sys.argv[1:]} | {name: os.environ.get(name) for name in names}
sys.stdout.write(json.dumps(facts) + "\\n")  # one write: tasks share a pipe
if os.environ["RANK"] == "1":
    with open("codes") as file:
        code, *rest = file.read().split()
    with open("codes", "w") as file:
        file.write(" ".join(rest))
    sys.exit(int(code))
"""


@pytest.fixture
def submitted_from(tmp_path) -> Path:
    """A folder like the repository's, as far as the batch script looks."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def submit(folder: Path, *words: str, timeout: float = 60.0, **settings: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in (*LAUNCHER_VARIABLES, "DS_ENV_FILE")}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"PATH": path, "HOME": str(folder), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PAUSE_SECONDS": "0"}
    # Slurm runs a copy of the script from its own folder.
    copy = folder / "slurm_script"
    copy.write_text((REPOSITORY / "launch" / "slurm.sbatch").read_text())
    command = ["bash", str(copy), *words]
    return subprocess.run(
        command, cwd=folder, env=clean | job | settings, capture_output=True, text=True, timeout=timeout
    )


def test_tasks_get_every_launcher_s_names_and_signals_reach_them(submitted_from):
    (submitted_from / "codes").write_text("0")
    (submitted_from / ".deepspeed_env").write_text("FROM_FILE=a b\n")
    done = submit(submitted_from, "task.py", "a b", "$HOME;", "", SLURM_CPUS_PER_TASK="6")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    tasks = sorted((line for line in lines if "RANK" in line), key=lambda line: line["RANK"])
    # exec: Slurm's signal to the task's process reaches Python, not a shell that would die of it.
    assert {task["pid"] for task in tasks} == {line["pid"] for line in lines if "RANK" not in line}
    for rank, task in enumerate(tasks):
        assert task["words"] == ["a b", "$HOME;", ""] and task["FROM_FILE"] == "a b"
        assert (task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "2",
            "2",
        )
        assert task["MASTER_ADDR"] == "127.0.0.1" and task["MASTER_PORT"] == tasks[0]["MASTER_PORT"]
    (options,) = [json.loads(line) for line in (submitted_from / "srun.jsonl").read_text().splitlines()]
    assert {"--wait=120", "--kill-on-bad-exit=0", "--cpus-per-task=6"} <= set(options)


@pytest.mark.parametrize(
    ("codes", "retries", "ends_with", "queued_again"),
    [("0", "0", 0, False), ("75", "0", 75, True), ("1", "0", 1, False), ("2", "3", 2, False), ("1 75", "1", 75, True)],
)
def test_only_a_run_that_stopped_well_is_queued_again(submitted_from, codes, retries, ends_with, queued_again):
    (submitted_from / "codes").write_text(codes)
    done = submit(submitted_from, "task.py", RETRIES=retries)
    assert done.returncode == ends_with
    asked = submitted_from / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if queued_again else "")


def test_wrong_submissions_end_in_one_line(submitted_from, tmp_path_factory):
    done = submit(submitted_from)
    assert done.returncode == 2 and "error: name the program" in done.stderr
    done = submit(tmp_path_factory.mktemp("elsewhere"), "task.py")
    assert done.returncode == 2 and done.stderr == "error: submit from the repository's folder\n"
    (submitted_from / ".deepspeed_env").write_text("# no\n")
    assert submit(submitted_from, "task.py").returncode == 2


def test_training_runs_under_srun(submitted_from):
    short = ("training.num_training_steps=4", "training.num_warmup_steps=1", "evaluation.max_samples=32")
    words = ("--deepspeed", str(REPOSITORY / "ds_configs" / "zero3.json"), *short, "logging.wandb=disabled")
    done = submit(submitted_from, str(REPOSITORY / "launch" / "train.py"), *words, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((submitted_from / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["step"] == 4
    # Two ranks of 16 make up the recipe's global batch of 32: they did meet.
    assert json.loads((submitted_from / "runs" / "quickstart" / "ds_config.json").read_text())["train_batch_size"] == 32
