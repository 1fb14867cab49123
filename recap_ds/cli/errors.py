"""How programs end: 0 done, 2 a wrong input with its one line, 1 a run that could not go on with its one line, 75 a
run that was asked to stop and has saved (start it again to go on).

Under the ``deepspeed`` launcher the first rank that exits non-zero takes the others down, so the rank that speaks must
be first: other local ranks wait for it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from recap_ds.errors import EXIT_STOPPED, RunFailed, RunStopped, UsageError

# How long local ranks above 0 wait to be ended by the launcher before they speak for themselves.
SILENCE_SECONDS = 30.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see --help")


def run_program(program: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call ``program`` and turn the errors meant for users into a line on stderr and an exit code."""
    try:
        return program(arguments)
    except UsageError as error:
        return _explain(error, 2)
    except RunFailed as error:
        return _explain(error, 1)
    except RunStopped:  # it has said so itself
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130


def _explain(error: Exception, code: int) -> int:
    text = " ".join(str(error).split())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank > 0 and not _joined():
        # Before the process group every rank finds the same fault; rank 0 says it and the launcher ends the rest.
        time.sleep(SILENCE_SECONDS)
    who = f"rank {os.environ['RANK']}: " if _joined() and os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error: {who}{text}", file=sys.stderr, flush=True)
    return code


def _joined() -> bool:
    """True = a process group exists. Asked without importing torch: most verbs never need it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
