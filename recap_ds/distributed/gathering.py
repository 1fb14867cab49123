"""How much of a model ZeRO-3 holds gathered at once: DeepSpeed's fetch, prefetch and release, on sizes alone.

Follows ``runtime/zero/partitioned_param_coordinator.py`` of deepspeed 0.19.8 with a complete trace, as it is from the
third step on. Parameters gathered together come in one flat buffer and are copied out of it, so for a moment they are
there twice; the buffer lives until the last of them was asked for. Small parameters stay gathered and count elsewhere
(``footprint.py``); a single rank gathers nothing. No tensors here, and no ranks.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

DEFAULT_LIMIT = 10**9  # DeepSpeed's own for live parameters and for the distance to the next use


class GatherTotals(NamedTuple):
    """Elements of the parameters' dtype."""

    peak_whole: int  # of whole parameters that are gathered or on their way at once
    peak_held: int  # the same with the flat buffers they come in: what memory must hold
    received: int  # gathered in one forward and backward, once for every time


def gather_totals(
    numels: Sequence[int], visits: Sequence[Sequence[int]], zero: dict[str, Any], world: int
) -> GatherTotals:
    """``visits``: the parameters (by their place in ``numels``) that each module owns, in the order in which forward,
    recomputation and backward come to them; ``zero``: a resolved ``zero_optimization``.
    """
    if world == 1 or zero["stage"] != 3:
        return GatherTotals(0, 0, 0)
    return _Coordinator(numels, visits, zero).run()


class _Coordinator:
    def __init__(self, numels: Sequence[int], visits: Sequence[Sequence[int]], zero: dict[str, Any]):
        self._numels, self._visits = numels, visits
        threshold = int(zero["stage3_param_persistence_threshold"])
        live, reuse = zero.get("stage3_max_live_parameters"), zero.get("stage3_max_reuse_distance")
        self._persistent = {index for index, numel in enumerate(numels) if numel <= threshold}
        self._max_prefetch = int(zero["stage3_prefetch_bucket_size"])
        self._max_live = DEFAULT_LIMIT if live is None else int(live)
        self._max_reuse = DEFAULT_LIMIT if reuse is None else int(reuse)
        self._uses: dict[int, list[int]] = defaultdict(list)  # parameter -> steps at which a module needs it
        for step, visit in enumerate(visits):
            for index in sorted(set(visit)):
                self._uses[index].append(step)
        # Elements traversed before each step.
        self._traversed = [0, *accumulate(self._elements(visit) for visit in visits)]
        self._queue = deque((index, step) for step, visit in enumerate(visits) for index in sorted(set(visit)))
        self._queued_up_to: dict[int, int] = defaultdict(lambda: -1)  # the last use that left the queue
        self._whole: set[int] = set()
        # Parameter -> its gather, until it is asked for; gather -> all that came in it.
        self._in_flight: dict[int, int] = {}
        self._groups: dict[int, set[int]] = {}
        self._num_gathers = self._live = self._peak_whole = self._peak_held = self._received = 0

    def run(self) -> GatherTotals:
        for step, visit in enumerate(self._visits):
            needed = set(visit) - self._persistent
            self._gather(needed - self._whole - self._in_flight.keys())
            for index in needed & self._in_flight.keys():
                self._arrive(index)
            self._take_from_queue({index for index in visit if self._queued_up_to[index] < step})
            self._prefetch()
            self._release(needed, step + 1)
        return GatherTotals(self._peak_whole, self._peak_held, self._received)

    def _gather(self, indices: set[int]) -> None:
        if not indices:
            return
        self._num_gathers += 1
        self._in_flight.update(dict.fromkeys(indices, self._num_gathers))
        self._groups[self._num_gathers] = indices
        self._live += self._elements(indices)
        self._received += self._elements(indices)
        self._note_peak()

    def _arrive(self, index: int) -> None:
        """The first that is asked for copies its whole group out of the flat buffer; the last lets that go."""
        gather = self._in_flight.pop(index)
        self._whole |= self._groups[gather]
        self._note_peak()
        if gather not in self._in_flight.values():
            del self._groups[gather]

    def _take_from_queue(self, indices: set[int]) -> None:
        taken: set[int] = set()
        while self._queue and len(taken) < len(indices):
            index, step = self._queue.popleft()
            self._queued_up_to[index] = step
            taken.add(index)

    def _prefetch(self) -> None:
        room = min(self._max_live - self._live, self._max_prefetch)
        chosen: set[int] = set()
        elements = 0
        while self._queue and elements < room:
            index, step = self._queue.popleft()
            self._queued_up_to[index] = max(self._queued_up_to[index], step)
            here = index in self._whole or index in self._in_flight or index in self._persistent
            if not here and index not in chosen:
                chosen.add(index)
                elements += self._numels[index]
        self._gather(chosen)

    def _release(self, indices: set[int], next_step: int) -> None:
        for index in indices:
            if self._queued_up_to[index] <= next_step and not self._is_used_soon(index, next_step):
                self._whole.discard(index)
                self._live -= self._numels[index]

    def _is_used_soon(self, index: int, step: int) -> bool:
        uses = self._uses[index]
        place = bisect_left(uses, step)
        if place == len(uses):
            return False
        return self._traversed[uses[place]] - self._traversed[step] < self._max_reuse

    def _note_peak(self) -> None:
        self._peak_whole = max(self._peak_whole, self._live)
        # A parameter gathered alone is used where it arrived, without a copy.
        buffers = sum(
            self._elements(group) if len(group) > 1 else self._elements(group - self._whole)
            for group in self._groups.values()
        )
        self._peak_held = max(self._peak_held, self._elements(self._whole) + buffers)

    def _elements(self, indices: Iterable[int]) -> int:
        return sum(self._numels[index] for index in indices)
