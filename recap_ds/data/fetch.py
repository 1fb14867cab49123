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
    num_wrong, patience = 0, _Patience(origin, name, patience_seconds)
    while True:
        try:
            found = problem(_copy(origin, name, file, max_bytes))
        except TransferFailed as failure:
            patience.pause(failure)
            continue
        if found is None:
            return
        num_wrong += 1
        if num_wrong == MAX_WRONG:
            raise FileLost(f"{name}: {found}, {MAX_WRONG} times")
        patience.pause(TransferFailed(found))


def stream_file(origin: Origin, name: str, *, max_bytes: int, patience_seconds: float) -> Iterator[bytes]:
    """The first ``max_bytes`` of a file as they come. One that breaks off is asked for again, and goes on where it was.

    Nothing is checked. Raises FileLost and RunFailed.
    """
    num_given, patience = 0, _Patience(origin, name, patience_seconds)
    while True:
        try:
            with closing(origin.read(name)) as blocks:
                position = 0
                for block in blocks:
                    fresh = block[max(0, num_given - position) : max_bytes - position]
                    position += len(block)
                    if fresh:
                        num_given += len(fresh)
                        patience = _Patience(origin, name, patience_seconds)
                        yield fresh
                    if num_given == max_bytes:
                        return
            return
        except TransferFailed as failure:
            patience.pause(failure)


class _Patience:
    """How long one file has been tried for."""

    def __init__(self, origin: Origin, name: str, seconds: float):
        self._origin, self._name, self._seconds = origin, name, seconds
        self._deadline = time.monotonic() + seconds
        self._num_failed, self._pause = 0, FIRST_PAUSE_SECONDS

    def pause(self, failure: TransferFailed) -> None:
        """Wait before the next try; FileLost or RunFailed where there should be none."""
        if isinstance(failure, NotThere):
            raise FileLost(f"{self._name}: {failure}")
        if isinstance(failure, Refused):
            raise RunFailed(f"{self._origin.place}: {self._name} cannot be had: {failure}")
        self._num_failed += 1
        # Ranks that lost the same server do not come back to it all at once.
        pause = self._pause * _jitter.uniform(0.5, 1.5)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        if time.monotonic() + pause > self._deadline:
            raise RunFailed(
                f"{self._origin.place}: {self._name} could not be fetched, {self._num_failed} times within "
                f"{self._seconds:g} s (data.fetch_patience_seconds); at last: {failure}"
            )
        if self._num_failed > QUIET_FAILURES:
            said = f"warning: {self._origin.place}: {self._name}: {failure}; again in {pause:.1f} s"
            print(said, file=sys.stderr, flush=True)
        time.sleep(pause)


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
