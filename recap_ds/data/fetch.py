"""A remote file, tried until it is here and is the right one, or until that is hopeless.

What breaks off is tried again, at growing intervals, for as long as ``patience_seconds``: then the run ends (RunFailed)
and goes on from its checkpoint another time. That a file is not there, or came whole several times and was wrong each
time, will not change: that is FileLost, and what it means is the caller's to say.
"""

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO

from recap_ds.data.remote import NotThere, Origin, Refused, TransferFailed
from recap_ds.errors import RunFailed
from recap_ds.files.records import FileRecord

MAX_WRONG = 3  # whole transfers of the wrong bytes
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
QUIET_FAILURES = 2  # so many are nobody's business

# Not the generator that torch seeds: how often a network failed must not show in anything random.
_jitter = random.Random(os.urandom(8))


class FileLost(Exception):
    """The remote side does not have the file, or has another one. The text says which, and of what file."""


def fetch_file(
    origin: Origin,
    name: str,
    file: IO[bytes],
    *,
    max_bytes: int,
    patience_seconds: float,
    problem: Callable[[FileRecord], str | None],
) -> None:
    """Write the file ``name`` to ``file``, from its start. ``problem``: what is wrong with what came, or None.

    Raises FileLost and RunFailed.
    """
    num_wrong = 0
    deadline = time.monotonic() + patience_seconds
    for num_failed, pause in enumerate(_pauses(), start=1):
        try:
            found = problem(_copy(origin, name, file, max_bytes))
            if found is None:
                return
            num_wrong += 1
        except NotThere as failure:
            raise FileLost(f"{name}: {failure}") from None
        except Refused as failure:
            raise RunFailed(f"{origin.place}: {name} cannot be had: {failure}") from None
        except TransferFailed as failure:
            found = str(failure)
        if num_wrong == MAX_WRONG:
            raise FileLost(f"{name}: {found}, {MAX_WRONG} times")
        if time.monotonic() + pause > deadline:
            raise RunFailed(
                f"{origin.place}: {name} could not be fetched, {num_failed} times within {patience_seconds:g} s "
                f"(data.fetch_patience_seconds); at last: {found}"
            )
        if num_failed > QUIET_FAILURES:
            print(f"warning: {origin.place}: {name}: {found}; again in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE_SECONDS
    while True:
        # Ranks that lost the same server do not come back to it all at once.
        yield pause * _jitter.uniform(0.5, 1.5)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _copy(origin: Origin, name: str, file: IO[bytes], max_bytes: int) -> FileRecord:
    """One transfer; what is more than ``max_bytes`` is not written, and not asked for."""
    file.seek(0)
    digest, num_bytes = hashlib.sha256(), 0
    with closing(origin.read(name)) as blocks:
        for block in blocks:
            num_bytes += len(block)
            if num_bytes > max_bytes:
                break
            file.write(block)
            digest.update(block)
    # Not before: a file that was laid out at its full size holds its place on the disk while it fills.
    file.truncate()
    file.flush()
    return FileRecord(num_bytes, digest.hexdigest())
