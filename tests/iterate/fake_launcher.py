"""Stands where ``deepspeed`` would: notes the command it got and leaves behind what the program would have.

    python fake_launcher.py JOURNAL PROGRAM ARGUMENTS...

``JOURNAL.fail`` names a job (critic, label, policy); the fake fails at it once, after half its work. While there is a
``JOURNAL.wait``, a job trains until it is told to stop, and ends as a training run does that saved in time; where that
says "dies", by the signal. Where it says "launches", the job is a rank below this process, which dies by the signal.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def overrides_of(arguments):
    return dict(text.split("=", 1) for text in arguments if "=" in text)


def flag(arguments, name):
    return arguments[arguments.index(name) + 1]


def fails(journal, job):
    order = Path(f"{journal}.fail")
    if order.is_file() and order.read_text() == job:
        order.unlink()
        return True
    return False


def train(journal, arguments):
    settings = overrides_of(arguments)
    run = Path(settings["runs_dir"]) / settings["name"]
    checkpoint = run / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True, exist_ok=True)
    if fails(journal, settings["name"]):
        return 1
    (run / "checkpoints" / "best").unlink(missing_ok=True)
    (run / "checkpoints" / "best").symlink_to("step_00000007")
    (run / "summary.json").write_text(json.dumps({"step": 7, "run": str(run)}))
    return 0


def label(journal, arguments):
    assert Path(flag(arguments, "--checkpoint")).is_dir(), "labels come from a checkpoint that is there"
    folder = Path(flag(arguments, "--shards")) / "labels" / flag(arguments, "--tag")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo-000000.parquet").touch()
    if fails(journal, "label"):
        return 1
    (folder / "labels.json").write_text("{}")
    return 0


def evaluate(journal, arguments):
    out = Path(flag(arguments, "--out"))
    assert Path(flag(arguments, "--checkpoint"), "summary.json").is_file(), "a policy that is trained"
    if fails(journal, "evaluate"):
        return 1
    episodes = [
        {"episode": i, "seed": i, "task": "a", "success": i > 0, "frames": 9, "video": None, "sum_reward": 0.0}
        for i in range(4)
    ]
    figures = {
        "num_episodes": 4,
        "num_successes": 3,
        "success_rate": 0.75,
        "success_rate_interval": [0.3, 0.95],
        "successes_per_hour": 120.0,
        "successes_per_hour_interval": [60.0, 160.0],
        "mean_frames": 9.0,
    }
    entry = {"checkpoint": "policy", "indicator": "positive", "guidance_beta": 1.0, **figures, "tasks": {"a": figures}}
    entry |= {"paired_with_first_entry": None, "episodes": episodes}
    rollouts = {"env": "reach", "num_episodes": 4, "seed": 0, "entries": [entry]}
    out.write_text(
        json.dumps({"checkpoint": "policy", "dataset_path": None, "dataset_evaluation": None, "rollouts": rollouts})
    )
    return 0


def save(journal):
    Path(f"{journal}.saved").touch()
    sys.exit(75)


def main(journal, program, *arguments):
    waiting = Path(f"{journal}.wait")
    how = waiting.read_text() if waiting.is_file() else ""
    if how == "launches" and "LOCAL_RANK" not in os.environ:
        return subprocess.call([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "0"})
    if waiting.is_file() and how != "dies":
        signal.signal(signal.SIGTERM, lambda *_: save(journal))
    with open(journal, "a", encoding="utf-8") as file:
        file.write(json.dumps([Path(program).name, *arguments]) + "\n")
    if waiting.is_file():
        time.sleep(60)
    return {"train.py": train, "label.py": label, "evaluate.py": evaluate}[Path(program).name](journal, arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
