"""Held-out evaluation batches: the same samples, noise and times whatever the checkpoint, step or number of ranks.

At most ``evaluation.max_samples`` samples are chosen, spread evenly over sources and tasks. Every rank gets the same
number of batches (a rank with fewer would hang ZeRO-3); rows that no sample is left for, or that only lend their images
to another (``partners.py``), have ``sample_valid`` False. Random numbers are keyed by what a sample is, not by a slot,
so they stay when data is added.

    F = evaluation.num_flow_times, at (j + 0.5) / F
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.batch import NUM_AUGMENTATION_DRAWS, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.data.draws import evaluation_noise
from recap_ds.data.loader import log_damage
from recap_ds.data.partners import Lending, lend_images
from recap_ds.data.shard_set import DamagedSample, ShardSet

NO_SLOT = -1


def choose_samples(shard_set: ShardSet, held_out_fraction: float, max_samples: int) -> np.ndarray:
    """Ids, ascending, of at most ``max_samples`` held-out samples, shared out evenly over (source, task)."""
    table = shard_set.table
    held_out = np.flatnonzero(shard_set.held_out(held_out_fraction))
    # The lowest hashes win, so that the choice is the same for every seed and changes little when data is added.
    rank = np.fromiter((shard_set.identity(i) for i in held_out), np.uint64, len(held_out))
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


class _Rows(NamedTuple):
    """What a batch holds: samples to evaluate, and those that only lend their images to one of them."""

    samples: list[int]  # ids, each once
    evaluated: list[bool]
    image_lender: list[int]  # rows of this batch


def plan_batches(lending: Lending, num_rows: int) -> list[_Rows]:
    """Every sample evaluated once, in a batch of at most ``num_rows`` that holds its lender too."""
    assert num_rows >= 2, num_rows
    batches: list[_Rows] = []
    places: dict[int, int] = {}  # sample -> its row in the last batch
    for sample, lender in zip(lending.sample.tolist(), lending.lender.tolist(), strict=True):
        if not batches or len(places.keys() | {sample, lender}) > num_rows:
            batches.append(_Rows([], [], []))
            places = {}
        batch = batches[-1]
        for wanted in (lender, sample):
            if wanted not in places:
                places[wanted] = len(batch.samples)
                batch.samples.append(wanted)
                batch.evaluated.append(False)
                batch.image_lender.append(places[wanted])
        batch.evaluated[places[sample]] = True
        batch.image_lender[places[sample]] = places[lender]
    return batches


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
        # Nearly always one row is enough to lend images to a batch; the others lend to each other.
        self._num_rows = config.evaluation.batch_size + 1
        self._rank, self._world = rank, world
        self._draw_shape = (config.evaluation.num_flow_times, config.chunk_size, config.max_action_dim)
        shard_set, fraction = assembler.shard_set, config.data.held_out_fraction
        chosen = choose_samples(shard_set, fraction, config.evaluation.max_samples)
        self._plan = plan_batches(lend_images(shard_set, chosen, fraction), self._num_rows)
        # Ids in the order of the valid rows of all ranks' batches.
        self.samples = np.array([i for rows in self._plan for i in np.array(rows.samples)[rows.evaluated]], np.int64)

    def __len__(self) -> int:
        """Batches per rank; 0 where nothing is held out."""
        return -(-len(self._plan) // self._world)

    def __iter__(self) -> Iterator[TransitionBatch]:
        for number in range(self._rank, len(self) * self._world, self._world):
            yield self._batch(self._plan[number] if number < len(self._plan) else _Rows([], [], []))

    def _batch(self, rows: _Rows) -> TransitionBatch:
        size, num_times, num_present = self._num_rows, self._draw_shape[0], len(rows.samples)
        # Rows without a sample take the numbers of the first one chosen; sample_valid False keeps them out.
        samples, image_lender = np.full(size, self.samples[0]), np.arange(size)
        samples[:num_present], image_lender[:num_present] = rows.samples, rows.image_lender
        valid, damaged = np.zeros(size, bool), np.zeros(size, bool)
        arrays = [self._assembler.blank()] * size
        noise = np.zeros((size, *self._draw_shape), np.float32)
        for row, sample in enumerate(rows.samples):
            try:
                arrays[row] = self._assembler.read(sample)
            except DamagedSample as damage:
                # Not replaced: the other samples' figures must not depend on who is missing.
                log_damage(self._damage_log, damage, NO_SLOT)
                damaged[row] = True
                continue
            valid[row] = rows.evaluated[row]
            identity = self._assembler.shard_set.identity(sample)
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
        return self._assembler.stack(samples, arrays, draws, valid, damaged, image_lender)
