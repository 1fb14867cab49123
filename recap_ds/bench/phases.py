"""Where the time of a step goes: a host clock that belongs to one phase at a time.

A phase that begins inside another stops the other's clock, so that phases add up to the whole. On an accelerator every
turn waits for the device, which makes shares honest and the step slower: take step times from steps nobody watches.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from recap_ds.distributed.runtime import wait_for_device

REST = "other"
PHASES = ("data", "forward", "backward", "communication", "optimizer", "shadows", REST)


class Watched(NamedTuple):
    """Calls of ``owner.method`` count as ``phase``."""

    owner: Any
    method: str
    phase: str


class PhaseClock:
    """``running`` False: nothing is watched and nothing waits."""

    def __init__(self, running: bool = True) -> None:
        self._running = running
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open = [REST]
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self._running:
            yield
            return
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    @contextmanager
    def watching(self, calls: Sequence[Watched]) -> Iterator[None]:
        """Inside, the methods are wrapped on their owners; afterwards they are as they were."""
        if not self._running:
            yield
            return
        own = [vars(owner).get(method) for owner, method, _ in calls]
        for owner, method, phase in calls:
            setattr(owner, method, self._timed(getattr(owner, method), phase))
        try:
            yield
        finally:
            for (owner, method, _), before in zip(calls, own, strict=True):
                if before is None:  # its class's
                    delattr(owner, method)
                else:
                    setattr(owner, method, before)

    def stop(self) -> dict[str, float]:
        """Seconds per phase since the clock was made."""
        self._turn()
        return self._seconds

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        return timed

    def _turn(self) -> None:
        wait_for_device()
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
