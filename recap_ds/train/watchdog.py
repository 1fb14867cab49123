"""A run that hangs: every rank writes down what all of its threads are doing, and the job ends.

A thread per rank looks at when the last mark was made. It communicates with nobody, so a collective that waits for ever
cannot stop it; ranks that wait for the same thing run out of time together.
"""

import faulthandler
import os
import sys
import threading
import time

from recap_ds.distributed.runtime import RankInfo
from recap_ds.train.failures import FailureLog

# The first rank that exits has its launcher end the others: those that run out of time a little later still write.
GRACE_SECONDS = 5.0
# Where even threads stand still (foreign code keeps Python's lock), a timer of faulthandler's, in C, ends the process.
LOCKED_SECONDS = 60.0


class Watchdog:
    """Watches while it is entered; ``timeout_seconds`` None never barks."""

    def __init__(self, log: FailureLog, info: RankInfo, timeout_seconds: float | None) -> None:
        self._log, self._info, self._timeout_seconds = log, info, timeout_seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.mark("joining the other ranks")

    def mark(self, what: str) -> None:
        """Progress was made; ``what`` is under way from here on. Costs nothing worth counting."""
        self._last = time.monotonic(), what

    @property
    def place(self) -> str:
        """What is under way."""
        return self._last[1]

    def __enter__(self) -> "Watchdog":
        if self._timeout_seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * GRACE_SECONDS)  # it may be about to end the process

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout_seconds / 4)):
            # The terminal's own: what stands in its place may have no descriptor for C to write to.
            faulthandler.dump_traceback_later(self._timeout_seconds + LOCKED_SECONDS, file=sys.__stderr__, exit=True)
            marked, what = self._last
            if time.monotonic() - marked > self._timeout_seconds:
                self._bark(what)
        faulthandler.cancel_dump_traceback_later()

    def _bark(self, what: str) -> None:
        said = f"nothing moved for {self._timeout_seconds:g} s (training.hang_timeout_seconds) since: {what}"
        self._log.stacks(said)
        time.sleep(GRACE_SECONDS if self._info.is_main else GRACE_SECONDS + 1.0)
        if self._done.is_set():  # it moved after all, and ended
            return
        if self._info.local_rank == 0:
            place = f"stacks of every rank are in {self._log.folder}"
            print(f"error: rank {self._info.rank}: {said}; {place}", file=sys.stderr, flush=True)
        os._exit(1)
