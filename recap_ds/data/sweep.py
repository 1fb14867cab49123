"""Every sample of some shards once, in tar order, in batches of one fixed size: what inference over a data set reads.

A batch never spans two shards; the last one of a shard is padded with rows whose ``sample_valid`` is False. Next
observations are not decoded. Nothing is random, and what a batch holds depends on its shard alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from recap_ds.batch import NUM_AUGMENTATION_DRAWS, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.data.loader import BatchLoader
from recap_ds.data.sample import SampleDecoder
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.data.workers import worker_options
from recap_ds.errors import RunFailed, UsageError
from recap_ds.processing.normalize import Normalizer

NO_SLOT = -1


class SweepDataset(Dataset):
    """Map-style over sample ids; a whole batch at a time. Picklable."""

    def __init__(self, assembler: Assembler, config: PiStarRECAPConfig, normalizer: Normalizer, batch_size: int):
        self._assembler = assembler
        self._decoder = SampleDecoder(assembler.shard_set.manifest, config, normalizer)
        self._batch_size = batch_size
        self._draw_shape = (1, config.chunk_size, config.max_action_dim)

    def __getitems__(self, samples: list[int]) -> TransitionBatch | UsageError | RunFailed:
        """The batch of ``samples``. An error is returned, not raised: crossing processes would garble its line."""
        try:
            return self.batch(np.asarray(samples, np.int64))
        except (UsageError, RunFailed) as error:
            return error

    def can_read(self, sample: int) -> bool:
        try:
            self._decoder.read(self._assembler.shard_set, sample, needs_next=False)
        except DamagedSample:
            return False
        return True

    def batch(self, present: np.ndarray) -> TransitionBatch:
        """``replaced`` is True and ``sample_valid`` False in the row of a sample that cannot be read."""
        size = self._batch_size
        samples = np.full(size, present[0])
        samples[: len(present)] = present
        valid, damaged = np.arange(size) < len(present), np.zeros(size, bool)
        arrays = [self._decoder.blank()] * size
        for row, sample in enumerate(present):
            try:
                arrays[row] = self._decoder.read(self._assembler.shard_set, int(sample), needs_next=False)
            except DamagedSample:
                valid[row], damaged[row] = False, True
        draws = BatchDraws(
            slot=np.full(size, NO_SLOT, np.int64),
            noise=np.zeros((size, *self._draw_shape), np.float32),
            time=np.ones((size, 1), np.float32),
            indicator_dropped=np.zeros(size, bool),
            # The middle of every draw is no augmentation at all.
            augmentation=np.full((size, NUM_AUGMENTATION_DRAWS), 0.5, np.float32),
        )
        return self._assembler.stack(samples, arrays, draws, valid, damaged)


class SweepBatches:
    """Batch sampler: the sample ids of each batch, shard after shard in the order given."""

    def __init__(self, shard_set: ShardSet, shards: Sequence[int], batch_size: int):
        starts = shard_set.shard_starts
        self._ranges = [range(int(starts[shard]), int(starts[shard + 1])) for shard in shards]
        self._batch_size = batch_size

    @property
    def sizes(self) -> list[list[int]]:
        """Per shard, how many samples each of its batches has."""
        return [[len(batch) for batch in self._split(ids)] for ids in self._ranges]

    def __len__(self) -> int:
        return sum(-(-len(ids) // self._batch_size) for ids in self._ranges)

    def __iter__(self) -> Iterator[list[int]]:
        for ids in self._ranges:
            for batch in self._split(ids):
                yield list(batch)

    def _split(self, ids: range) -> Iterator[range]:
        return (ids[first : first + self._batch_size] for first in range(0, len(ids), self._batch_size))


def build_sweep_loader(
    dataset: SweepDataset, batches: SweepBatches, config: PiStarRECAPConfig, pin_memory: bool
) -> BatchLoader:
    """Batches in the order of ``batches``, whatever data.num_workers is. ``pin_memory``: a device will copy them."""
    options = worker_options(config.data) if config.data.num_workers else {}
    return BatchLoader(dataset, batch_sampler=batches, collate_fn=_as_it_is, pin_memory=pin_memory, **options)


def _as_it_is(batch: TransitionBatch) -> TransitionBatch:
    return batch
