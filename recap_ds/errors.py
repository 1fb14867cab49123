"""The one exception a user is meant to see.

Scripts and verbs turn it into a single line on stderr and exit code 2. Everything else is our bug
and keeps its traceback.
"""


class UsageError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and how to mend it."""
