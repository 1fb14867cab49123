"""``launch/train.py`` with something that befalls it at one step: RECAP_DS_TEST_FAULT="KIND STEP [RANK]" (rank 1).

The program is the real one; only the step before which it happens is ours.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from recap_ds.cli.train import main
from recap_ds.errors import leave
from recap_ds.train import loop, program
from recap_ds.train.watchdog import Watchdog

VARIABLE = "RECAP_DS_TEST_FAULT"
QUICKSTART = Path(__file__).parents[2] / "launch" / "recipes" / "quickstart.yaml"
# Short only once the fault is there: a busy machine takes longer to begin.
HANG_SECONDS = 2.0


class SeenWatchdog(Watchdog):
    seen: "SeenWatchdog"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        SeenWatchdog.seen = self


def befall(kind: str) -> None:
    match kind:
        case "usr1":
            os.kill(os.getpid(), signal.SIGUSR1)
        case "file":
            Path("runs/quickstart/stop").touch()
        case "nothing":
            pass
        case "launcher":  # the ``deepspeed`` process alone, two above this one
            launcher = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(launcher), signal.SIGTERM)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "oom":
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        case "bug":
            raise KeyError("elbow")
        case "hang":
            time.sleep(3600)


def with_fault(take_step: Any) -> Any:
    kind, step, *given = os.environ[VARIABLE].split()
    rank = int(given[0]) if given else 1

    def faulty(session: Any, number: int, *arguments: Any, **named: Any) -> Any:
        if number == int(step):
            if kind == "hang":
                SeenWatchdog.seen._timeout_seconds = HANG_SECONDS
            if session.runtime.info.rank == rank:
                befall(kind)
        return take_step(session, number, *arguments, **named)

    return faulty


if __name__ == "__main__":
    if VARIABLE in os.environ:
        loop.take_step = with_fault(loop.take_step)
        program.Watchdog = SeenWatchdog
    leave(main(sys.argv[1:], QUICKSTART))
