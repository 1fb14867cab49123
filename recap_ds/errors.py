"""The one exception a user is meant to see.

Scripts and verbs turn it into a single line on stderr and exit code 2. Everything else is our bug
and keeps its traceback.
"""


class UsageError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and how to mend it."""


class RunFailed(RuntimeError):
    """A run cannot go on (it keeps diverging, a disk is full). One line as well, exit code 1; checkpoints are safe."""
