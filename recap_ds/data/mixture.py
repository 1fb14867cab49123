"""slot -> (part, k): the slot is the k-th draw of its part.

A segment of slots has constant weights. It is divided into blocks of BLOCK_SLOTS, and a block holds every part a fixed
number of times (its quota), permuted by (seed, block), so that k is arithmetic and nothing before the slot has to be
replayed. A new segment begins where a schedule changes the weights and where a part has been drawn as often as it may,
counted from there: all of them are known at the start.

    P parts   n slots
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.data.draws import Purpose, generator
from recap_ds.errors import UsageError

BLOCK_SLOTS = 4096


class Table(NamedTuple):
    """Weights from a slot on."""

    where: str  # the key of the configuration, for messages
    first_slot: int
    weights: np.ndarray  # [P]


class Segment(NamedTuple):
    first_slot: int
    quotas: np.ndarray  # [P] int64, slots per block
    drawn: np.ndarray  # [P] int64, draws before it


def block_quotas(where: str, names: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """Slots per block of each part, [P] int64, by largest remainder."""
    assert (weights >= 0).all() and weights.sum() > 0, weights
    exact = weights / weights.sum() * BLOCK_SLOTS
    for name, share in zip(names, exact, strict=True):
        if 0 < share < 1 - 1e-9:
            raise UsageError(
                f"{where}.{name}: a share of {share / BLOCK_SLOTS:.2g} is below 1/{BLOCK_SLOTS}, the smallest "
                f"that can be drawn; set {where} with a larger weight for {name}, or 0"
            )
    quotas = np.floor(exact).astype(np.int64)
    # Ties go to the earlier part: stable sort of the negated remainders.
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    quotas[by_remainder[: BLOCK_SLOTS - quotas.sum()]] += 1
    return quotas


class Mixture:
    def __init__(
        self,
        names: Sequence[str],
        tables: Sequence[Table],
        limits: Sequence[int | None],
        seed: int,
        slots_per_step: int,
        lane: int = 0,
    ):
        """``names`` [P]; ``tables`` in order, the first from slot 0 on; ``limits`` [P]: draws at most.

        ``lane`` keeps permutations apart (``order.py``); ``slots_per_step`` is for messages. UsageError where the
        limits leave nothing to draw.
        """
        self._seed = seed
        self._lane = lane
        self._slots_per_step = slots_per_step
        self._cached_block = (-1, -1)
        self._parts = self._ranks = np.empty(0, np.int64)
        self.segments: list[Segment] = []
        self._add_segments(names, tables, limits)
        self._starts = np.array([segment.first_slot for segment in self.segments], np.int64)

    def draws(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] part, [n] k) of [n] slots."""
        numbers = np.searchsorted(self._starts, slots, side="right") - 1
        blocks, within = np.divmod(slots - self._starts[numbers], BLOCK_SLOTS)
        part = np.empty(len(slots), np.int64)
        k = np.empty(len(slots), np.int64)
        for number, block in {(int(number), int(block)) for number, block in zip(numbers, blocks, strict=True)}:
            rows = (numbers == number) & (blocks == block)
            self._load_block(number, block)
            segment = self.segments[number]
            part[rows] = self._parts[within[rows]]
            k[rows] = (segment.drawn + segment.quotas * block)[part[rows]] + self._ranks[within[rows]]
        return part, k

    def drawn(self, slot: int) -> np.ndarray:
        """[P] draws of each part in the slots before ``slot``."""
        number = int(np.searchsorted(self._starts, slot, side="right")) - 1
        return self._drawn(number, slot)

    def _drawn(self, number: int, slot: int) -> np.ndarray:
        segment = self.segments[number]
        block, within = divmod(slot - segment.first_slot, BLOCK_SLOTS)
        self._load_block(number, block)
        counts = np.bincount(self._parts[:within], minlength=len(segment.quotas))
        return segment.drawn + segment.quotas * block + counts

    def _load_block(self, number: int, block: int) -> None:
        if (number, block) == self._cached_block:
            return
        quotas = self.segments[number].quotas
        multiset = np.repeat(np.arange(len(quotas)), quotas)
        place = (block, number, self._lane)
        self._parts = generator(self._seed, Purpose.BLOCK_SOURCES, *place).permutation(multiset)
        self._ranks = np.empty(BLOCK_SLOTS, np.int64)
        for part, quota in enumerate(quotas):
            self._ranks[self._parts == part] = np.arange(quota)
        self._cached_block = (number, block)

    def _add_segments(self, names: Sequence[str], tables: Sequence[Table], limits: Sequence[int | None]) -> None:
        slot, drawn = 0, np.zeros(len(names), np.int64)
        while True:
            table = [table for table in tables if table.first_slot <= slot][-1]
            used_up = np.array([limit is not None and drawn[part] >= limit for part, limit in enumerate(limits)], bool)
            weights = np.where(used_up, 0.0, table.weights)
            if not weights.sum() > 0:
                raise UsageError(
                    f"data.max_epochs: from step {slot // self._slots_per_step} on nothing is left to draw by the "
                    f"weights of {table.where}; leave one of its parts without a cap"
                )
            self.segments.append(Segment(slot, block_quotas(table.where, names, weights), drawn))
            ends = [self._limit_slot(part, limit) for part, limit in enumerate(limits) if limit is not None]
            ends += [table.first_slot for table in tables if table.first_slot > slot]
            if not (ends := [end for end in ends if end is not None]):
                return
            slot, drawn = min(ends), self._drawn(len(self.segments) - 1, min(ends))

    def _limit_slot(self, part: int, limit: int) -> int | None:
        """The slot after that of the last draw that ``part`` may have, by the last segment's weights; None = never."""
        number, segment = len(self.segments) - 1, self.segments[-1]
        if not segment.quotas[part] or segment.drawn[part] >= limit:
            return None
        block, rank = divmod(limit - int(segment.drawn[part]) - 1, int(segment.quotas[part]))
        self._load_block(number, block)
        return segment.first_slot + block * BLOCK_SLOTS + int(np.flatnonzero(self._parts == part)[rank]) + 1
