"""The order of training samples: a pure function of (seed, slot).

    slot --Mixture--> (source, k: the k-th draw of that source) --SourceEpochs--> (epoch, position) --> sample id

Slots come in blocks of BLOCK_SLOTS. A block holds every source a fixed number of times (its quota), permuted by
(seed, block), so k is arithmetic and nothing before the slot has to be replayed: a start at any slot is O(1).
An epoch of a source visits each of its kept samples exactly once: shards permuted by (seed, source, epoch), samples
permuted within windows of ``shuffle_shards`` shards, so that a reader touches few shards at a time.

Neither half knows of ranks, workers or files. Schedules and repeat caps replace Mixture; lanes replace SourceEpochs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.draws import Purpose, generator
from recap_ds.errors import UsageError

BLOCK_SLOTS = 4096
SOURCE_NAMES = tuple(SOURCE_IDS)


class KeptSamples(NamedTuple):
    """The samples of one source that training may draw, grouped by shard."""

    ids: np.ndarray  # [n] int64 sample ids
    shard_starts: np.ndarray  # [num_shards + 1] int64: shard j owns ids[shard_starts[j]:shard_starts[j + 1]]


def group_by_shard(ids: np.ndarray, shard: np.ndarray) -> KeptSamples:
    """``ids`` ascending, ``shard`` [n] the shard of each (ascending too); shards without a kept sample vanish."""
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    return KeptSamples(ids.astype(np.int64), np.append(starts, len(ids)).astype(np.int64))


def block_quotas(weights: Mapping[str, float] | None, num_samples: Mapping[str, int]) -> np.ndarray:
    """Slots per block of each source, [3] int64 in SOURCE_IDS order, by largest remainder.

    ``weights`` None makes every sample equally likely: sources weigh what they hold.
    """
    given = num_samples if weights is None else weights
    weight = np.array([given.get(name, 0) for name in SOURCE_NAMES], np.float64)
    if (weight < 0).any():
        raise UsageError("data.mixture: a weight cannot be negative")
    if not weight.sum() > 0:
        raise UsageError("data.shards: no sample is left for training; lower data.held_out_fraction or add data")
    exact = weight / weight.sum() * BLOCK_SLOTS
    for name, share in zip(SOURCE_NAMES, exact, strict=True):
        if share > 0 and not num_samples.get(name, 0):
            raise UsageError(
                f"data.mixture.{name}: the shards hold no {name} sample to train on; set it to 0 or add some"
            )
        if 0 < share < 1:
            raise UsageError(
                f"data.mixture.{name}: a share of {share / BLOCK_SLOTS:.2g} is below 1/{BLOCK_SLOTS}, the smallest "
                f"that can be drawn; set data.mixture with a larger weight for {name}, or 0"
            )
    quotas = np.floor(exact).astype(np.int64)
    # Ties go to the earlier source: stable sort of the negated remainders.
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    quotas[by_remainder[: BLOCK_SLOTS - quotas.sum()]] += 1
    return quotas


class Mixture:
    """slot -> (source, k) with constant quotas."""

    def __init__(self, quotas: np.ndarray, seed: int):
        assert quotas.sum() == BLOCK_SLOTS, quotas
        self.quotas = quotas
        self._seed = seed
        self._cached_block = -1
        self._sources = self._ranks = np.empty(0, np.int64)

    def draws(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] source, [n] k) of [n] slots: slot is the k-th draw of its source."""
        blocks, within = np.divmod(slots, BLOCK_SLOTS)
        source = np.empty(len(slots), np.int64)
        k = np.empty(len(slots), np.int64)
        for block in np.unique(blocks):
            rows = blocks == block
            self._load_block(int(block))
            source[rows] = self._sources[within[rows]]
            k[rows] = self.quotas[source[rows]] * block + self._ranks[within[rows]]
        return source, k

    def _load_block(self, block: int) -> None:
        if block == self._cached_block:
            return
        multiset = np.repeat(np.arange(len(self.quotas)), self.quotas)
        self._sources = generator(self._seed, Purpose.BLOCK_SOURCES, block).permutation(multiset)
        self._ranks = np.empty(BLOCK_SLOTS, np.int64)
        for source, quota in enumerate(self.quotas):
            self._ranks[self._sources == source] = np.arange(quota)
        self._cached_block = block


class SourceEpochs:
    """k -> sample id within one source, epoch after epoch."""

    def __init__(self, source: int, kept: KeptSamples, seed: int, shuffle_shards: int):
        self.kept = kept
        self._source = source
        self._seed = seed
        self._shuffle_shards = shuffle_shards
        self._cached_epoch = self._cached_window = -1
        self._shards = self._window_ends = self._window_ids = np.empty(0, np.int64)

    def samples(self, k: np.ndarray) -> np.ndarray:
        """[n] sample ids of draws ``k`` [n]."""
        epochs, positions = np.divmod(k, len(self.kept.ids))
        ids = np.empty(len(k), np.int64)
        for epoch in np.unique(epochs):
            self._load_epoch(int(epoch))
            rows = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(self._window_ends, positions[rows], side="right")
            for window in np.unique(windows):
                self._load_window(int(window))
                inside = rows[windows == window]
                ids[inside] = self._window_ids[positions[inside] - self._window_start(int(window))]
        return ids

    def _window_start(self, window: int) -> int:
        return int(self._window_ends[window - 1]) if window else 0

    def _load_epoch(self, epoch: int) -> None:
        if epoch == self._cached_epoch:
            return
        sizes = np.diff(self.kept.shard_starts)
        self._shards = generator(self._seed, Purpose.EPOCH_SHARDS, self._source, epoch).permutation(len(sizes))
        ends = np.cumsum(sizes[self._shards])
        last_of_window = np.arange(self._shuffle_shards, len(ends) + self._shuffle_shards, self._shuffle_shards) - 1
        self._window_ends = ends[np.minimum(last_of_window, len(ends) - 1)]
        self._cached_epoch, self._cached_window = epoch, -1

    def _load_window(self, window: int) -> None:
        if window == self._cached_window:
            return
        starts = self.kept.shard_starts
        shards = self._shards[window * self._shuffle_shards : (window + 1) * self._shuffle_shards]
        ids = np.concatenate([self.kept.ids[starts[shard] : starts[shard + 1]] for shard in shards])
        place = (self._source, self._cached_epoch, window)
        self._window_ids = generator(self._seed, Purpose.WINDOW_SAMPLES, *place).permutation(ids)
        self._cached_window = window


class SampleOrder:
    """slot -> (source, sample id), for whole batches of slots."""

    def __init__(
        self, kept: Mapping[str, KeptSamples], weights: Mapping[str, float] | None, seed: int, shuffle_shards: int
    ):
        quotas = block_quotas(weights, {name: len(samples.ids) for name, samples in kept.items()})
        self.mixture = Mixture(quotas, seed)
        self._epochs = {
            SOURCE_IDS[name]: SourceEpochs(SOURCE_IDS[name], samples, seed, shuffle_shards)
            for name, samples in kept.items()
            if quotas[SOURCE_IDS[name]]
        }
        self._seed = seed

    def samples(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] source, [n] sample id) of [n] slots."""
        source, k = self.mixture.draws(slots)
        ids = np.empty(len(slots), np.int64)
        for number in np.unique(source):
            rows = source == number
            ids[rows] = self._epochs[int(number)].samples(k[rows])
        return source, ids

    def epochs(self, slot: int) -> dict[str, float]:
        """Source name -> epochs of it that the first ``slot`` slots take, to within a block."""
        names = {number: name for name, number in SOURCE_IDS.items()}
        share = self.mixture.quotas / BLOCK_SLOTS
        return {names[number]: slot * share[number] / len(part.kept.ids) for number, part in self._epochs.items()}

    def replacement(self, source: int, slot: int, attempt: int) -> int:
        """A sample id of the same source to stand in for a damaged one; another per ``attempt``."""
        ids = self._epochs[source].kept.ids
        return int(ids[generator(self._seed, Purpose.REPLACEMENT, slot, attempt).integers(len(ids))])
