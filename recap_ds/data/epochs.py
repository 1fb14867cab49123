"""k -> sample id within one part of the data: epochs that visit each kept sample exactly once.

Shards are permuted per epoch, samples within windows of ``shuffle_shards`` shards, so that a reader touches few shards
at a time. Ids are made shard by shard when a window is read: what a worker holds does not grow with the samples.

    j shards of the part   E episodes of the set   n samples asked for
"""

import numpy as np

from recap_ds.data.draws import Purpose, generator
from recap_ds.data.sample_table import SetIndex


class KeptSamples:
    """The samples of one part that training may draw: those of some episodes in some shards."""

    def __init__(self, index: SetIndex, shards: np.ndarray, kept: np.ndarray):
        """``shards`` [j] ascending, ``kept`` [E] bool."""
        # The whole index and not its arrays: that is what other processes map instead of copying.
        self._index, self._kept = index, kept
        sizes = np.array([np.count_nonzero(self._kept_rows(shard)) for shard in shards], np.int64)
        self.shards = shards[sizes > 0]
        self.sizes = sizes[sizes > 0]  # [j], samples kept of each
        self.num_samples = int(sizes.sum())

    def of_shard(self, place: int) -> np.ndarray:
        """Ids, ascending, of the shard ``self.shards[place]``."""
        shard = self.shards[place]
        return self._index.shard_starts[shard] + np.flatnonzero(self._kept_rows(shard))

    def at(self, position: int) -> int:
        """The sample at ``position`` of all, in the order of their ids."""
        ends = np.cumsum(self.sizes)
        place = int(np.searchsorted(ends, position, side="right"))
        return int(self.of_shard(place)[position - (ends[place] - self.sizes[place])])

    def only(self, places: np.ndarray) -> "KeptSamples":
        """The part of it in the shards at ``places``, ascending."""
        return KeptSamples(self._index, self.shards[places], self._kept)

    def _kept_rows(self, shard: int) -> np.ndarray:
        """[samples of the shard] bool."""
        starts = self._index.shard_starts
        return self._kept[self._index.table.episode[starts[shard] : starts[shard + 1]]]


class Epochs:
    """k -> sample id, epoch after epoch."""

    def __init__(self, stream: int, samples: KeptSamples, seed: int, shuffle_shards: int):
        """``stream``: the number that keeps these permutations apart from those of other parts."""
        self.samples = samples
        self._stream = stream
        self._seed = seed
        self._shuffle_shards = shuffle_shards
        self._cached_epoch = self._cached_window = -1
        self._shards = self._window_ends = self._window_ids = np.empty(0, np.int64)

    def draw(self, k: np.ndarray) -> np.ndarray:
        """[n] sample ids of draws ``k`` [n]."""
        epochs, positions = np.divmod(k, self.samples.num_samples)
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
        sizes = self.samples.sizes
        self._shards = generator(self._seed, Purpose.EPOCH_SHARDS, self._stream, epoch).permutation(len(sizes))
        ends = np.cumsum(sizes[self._shards])
        last_of_window = np.arange(self._shuffle_shards, len(ends) + self._shuffle_shards, self._shuffle_shards) - 1
        self._window_ends = ends[np.minimum(last_of_window, len(ends) - 1)]
        self._cached_epoch, self._cached_window = epoch, -1

    def _load_window(self, window: int) -> None:
        if window == self._cached_window:
            return
        shards = self._shards[window * self._shuffle_shards : (window + 1) * self._shuffle_shards]
        ids = np.concatenate([self.samples.of_shard(shard) for shard in shards])
        place = (self._stream, self._cached_epoch, window)
        self._window_ids = generator(self._seed, Purpose.WINDOW_SAMPLES, *place).permutation(ids)
        self._cached_window = window
