"""Held-out evaluation batches: the same samples, noise and times whatever the checkpoint, step or number of ranks.

At most ``evaluation.max_samples`` samples are chosen, spread evenly over sources and tasks. Every rank gets the same
number of batches (a rank with fewer would hang ZeRO-3); rows that no sample is left for have ``sample_valid`` False.
Random numbers are keyed by what a sample is, not by a slot, so they stay when data is added.

    F = evaluation.num_flow_times, at (j + 0.5) / F
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recap_ds.batch import NUM_AUGMENTATION_DRAWS, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.data.draws import evaluation_noise
from recap_ds.data.loader import log_damage
from recap_ds.data.shard_set import DamagedSample, ShardSet

NO_SLOT = -1


def choose_samples(shard_set: ShardSet, held_out_fraction: float, max_samples: int) -> np.ndarray:
    """Ids, ascending, of at most ``max_samples`` held-out samples, shared out evenly over (source, task)."""
    table = shard_set.table
    held_out = np.flatnonzero(shard_set.held_out(held_out_fraction))
    # The lowest hashes win, so that the choice is the same for every seed and changes little when data is added.
    rank = np.array([shard_set.identity(i) for i in held_out], np.uint64)
    # (source, task) as one number
    group = table.source[held_out].astype(np.int64) * len(shard_set.manifest.tasks) + table.task[held_out]
    by_size = sorted((held_out[group == i][np.argsort(rank[group == i])] for i in np.unique(group)), key=len)
    chosen, places = [], max_samples
    for i, ids in enumerate(by_size):
        # Smallest first: what a group cannot give is shared by those after it.
        share = -(-places // (len(by_size) - i))
        chosen.append(ids[:share])
        places -= len(chosen[-1])
    return np.sort(np.concatenate(chosen)) if chosen else held_out


class EvaluationBatches:
    """Iterable of one rank's evaluation batches; iterate it as often as there are evaluations."""

    def __init__(
        self,
        assembler: Assembler,
        config: PiStarRECAPConfig,
        *,
        rank: int,
        world: int,
        damage_log: Path | None = None,
    ):
        assert 0 <= rank < world, (rank, world)
        self._assembler = assembler
        self._damage_log = damage_log
        self._seed = config.training.seed
        self._batch_size = config.evaluation.batch_size
        self._rank, self._world = rank, world
        self._draw_shape = (config.evaluation.num_flow_times, config.chunk_size, config.max_action_dim)
        self.samples = choose_samples(assembler.shard_set, config.data.held_out_fraction, config.evaluation.max_samples)

    def __len__(self) -> int:
        """Batches per rank; 0 where nothing is held out."""
        return -(-len(self.samples) // (self._batch_size * self._world))

    def __iter__(self) -> Iterator[TransitionBatch]:
        for number in range(len(self)):
            first = (number * self._world + self._rank) * self._batch_size
            yield self._batch(self.samples[first : first + self._batch_size])

    def _batch(self, present: np.ndarray) -> TransitionBatch:
        size, num_times = self._batch_size, self._draw_shape[0]
        # Rows without a sample take the numbers of the first one chosen; sample_valid False keeps them out.
        samples = np.full(size, self.samples[0])
        samples[: len(present)] = present
        valid, damaged = np.arange(size) < len(present), np.zeros(size, bool)
        arrays = [self._assembler.blank()] * size
        noise = np.zeros((size, *self._draw_shape), np.float32)
        for row, sample in enumerate(present):
            try:
                arrays[row] = self._assembler.read(int(sample))
            except DamagedSample as damage:
                # Not replaced: the other samples' figures must not depend on who is missing.
                log_damage(self._damage_log, damage, NO_SLOT)
                valid[row], damaged[row] = False, True
                continue
            identity = self._assembler.shard_set.identity(int(sample))
            noise[row] = evaluation_noise(self._seed, identity, self._draw_shape)
        times = (np.arange(num_times) + 0.5) / num_times
        draws = BatchDraws(
            slot=np.full(size, NO_SLOT, np.int64),
            noise=noise,
            time=np.tile(times.astype(np.float32), (size, 1)),
            indicator_dropped=np.zeros(size, bool),
            # The middle of every draw is no augmentation at all.
            augmentation=np.full((size, NUM_AUGMENTATION_DRAWS), 0.5, np.float32),
        )
        return self._assembler.stack(samples, arrays, draws, valid, damaged)
