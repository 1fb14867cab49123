"""The exceptions that a user is meant to see.

Scripts and verbs turn them into a single line on stderr and an exit code. Everything else is our bug and keeps its
traceback.
"""


class UsageError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and how to mend it."""


class RunFailed(RuntimeError):
    """A run cannot go on (it keeps diverging, a disk is full). One line as well, exit code 1; checkpoints are safe."""


# EX_TEMPFAIL, which schedulers take for "start it again".
EXIT_STOPPED = 75


class RunStopped(Exception):
    """A run was asked to stop before its end and did, in order. Exit code 75; the same command goes on with it."""
