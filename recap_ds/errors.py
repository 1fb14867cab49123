"""The exceptions that a user is meant to see.

Scripts and verbs turn them into a single line on stderr and an exit code. Everything else is our bug and keeps its
traceback. Beside them, how a process of many ranks leaves.
"""

import os
import sys
from typing import NoReturn


class UsageError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and how to mend it."""


class RunFailed(RuntimeError):
    """A run cannot go on (it keeps diverging, a disk is full). One line as well, exit code 1; checkpoints are safe."""


# EX_TEMPFAIL, which schedulers take for "start it again".
EXIT_STOPPED = 75


class RunStopped(Exception):
    """A run was asked to stop before its end and did, in order. Exit code 75; the same command goes on with it."""


def leave(code: int) -> NoReturn:
    """End this process once all it writes is written, without the interpreter's teardown.

    Exit handlers of libraries would wait for ranks that are gone, and threads of C++ libraries were seen to abort in
    it ('terminate called without an active exception'): a launcher then reports a signal in place of 75 or 0.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
