"""Stands where launch/train.py would: notes its command and leaves the summary of a finished run.

``fail`` in the working folder names a run at which it ends once with code 1; while there is a ``wait``, it trains until
it is told to stop.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def wait(run):
    """Until it is told to stop; then it takes a while to save, in which another word would be one too many."""

    def save(*_):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: run.with_name("lost").touch())
        time.sleep(0.5 if run.parent.name.startswith("plain") else 0.1)
        sys.exit(75)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, save)
    run.parent.mkdir(parents=True, exist_ok=True)
    run.with_name("waiting").touch()
    time.sleep(60)


def main(arguments):
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    run = Path(settings["runs_dir"]) / settings["name"]
    with open("journal", "a", encoding="utf-8") as journal:
        journal.write(json.dumps(["train", *arguments]) + "\n")
    fail = Path("fail")
    if fail.is_file() and fail.read_text() == str(run):
        fail.unlink()
        print("error: nothing works", file=sys.stderr)
        return 1
    if Path("wait").is_file() and settings["name"] == "policy":
        wait(run)
    run.mkdir(parents=True, exist_ok=True)
    summary = {"step": 2, "gate": {"gate": "loss", "best": None}, "threads": os.environ["OMP_NUM_THREADS"]}
    step = run / "checkpoints" / "step_00000002"
    step.mkdir(parents=True, exist_ok=True)
    (step / "state.json").write_text(str(time.time_ns()))  # as a checkpoint's, it differs between two trainings
    (run / "summary.json").write_text(json.dumps(summary))
    return 0


sys.exit(main(sys.argv[1:]))
