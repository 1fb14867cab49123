"""Slots -> batches: the training data set and the DataLoader that prefetches it.

Step n takes the next ``sizes.total`` slots, rank r its slice of them, micro-batch by micro-batch; what a slot holds is
decided by ``order.py`` alone. So the stream is the same for every world size, accumulation and worker count, and a
start at any slot is O(1). A damaged sample is replaced by another of its part of the mixture, by (seed, slot, attempt),
flagged and logged; how many are too many is the training loop's decision.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recap_ds.algo.flow_matching import flow_time
from recap_ds.batch import TransitionBatch
from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.data.draws import training_draws
from recap_ds.data.order import SampleOrder
from recap_ds.data.packing import PackedBatch, pack, unpack
from recap_ds.data.parts import training_parts
from recap_ds.data.sample import SampleArrays
from recap_ds.data.shard_set import DamagedSample
from recap_ds.data.workers import worker_options
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.lines import append_line

# Replacements tried for one slot. With one sample in ten damaged, all fail once in 10^16 slots.
MAX_ATTEMPTS = 16


class TransitionDataset(Dataset):
    """Map-style over slots; a whole micro-batch at a time. Picklable."""

    def __init__(
        self, assembler: Assembler, config: PiStarRECAPConfig, slots_per_step: int, damage_log: Path | None = None
    ):
        """``slots_per_step``: the global batch. ``damage_log``: a JSON line per damaged sample met is appended to it,
        by every process."""
        self.assembler = assembler
        parts = training_parts(assembler.shard_set, config.data)
        self.order = SampleOrder(parts, config.data, config.training.seed, slots_per_step)
        self._damage_log = damage_log
        self._seed = config.training.seed
        self._draw_shape = (config.model.flow_samples, config.chunk_size, config.max_action_dim)
        self._indicator_dropout = config.recap.indicator_dropout

    def __getitems__(self, slots: list[int]) -> TransitionBatch | UsageError | RunFailed:
        """The micro-batch of ``slots``. An error is returned, not raised: crossing processes would garble its line."""
        try:
            return self.batch(np.asarray(slots, np.int64))
        except (UsageError, RunFailed) as error:
            return error

    def batch(self, slots: np.ndarray) -> TransitionBatch:
        parts, samples = self.order.samples(slots)
        arrays, replaced = [], np.zeros(len(slots), bool)
        for row, slot in enumerate(slots):
            samples[row], read, replaced[row] = self._read(int(slot), int(parts[row]), int(samples[row]))
            arrays.append(read)
        return self.assembler.stack(samples, arrays, self._draws(slots), np.ones(len(slots), bool), replaced)

    def _draws(self, slots: np.ndarray) -> BatchDraws:
        rows = [training_draws(self._seed, int(slot), self._draw_shape, self._indicator_dropout) for slot in slots]
        noise, uniform, dropped, augmentation = (np.stack(column) for column in zip(*rows, strict=True))
        time = flow_time(torch.from_numpy(uniform)).float().numpy()
        return BatchDraws(slots, noise, time, dropped, augmentation)

    def starting_at(self, slot: int) -> "TransitionDataset":
        """What a loader of the slots from ``slot`` on reads from: any slot can be read at any time."""
        return self

    def names(self, slots: np.ndarray, what: str) -> list[str]:
        """Shard and key of the samples in ``slots``, and ``what`` is with them."""
        return [str(self.assembler.shard_set.damaged(int(i), what)) for i in self.order.samples(slots)[1]]

    def _read(self, slot: int, part: int, sample: int) -> tuple[int, SampleArrays, bool]:
        """The sample that fills the slot, by choice ``sample``; True if another had to stand in for it."""
        for attempt in range(MAX_ATTEMPTS + 1):
            try:
                return sample, self.assembler.read(sample), attempt > 0
            except DamagedSample as damage:
                log_damage(self._damage_log, damage, slot)
                last = damage
            sample = self.order.replacement(part, slot, attempt)
        place = self.assembler.shard_set.place
        raise UsageError(
            f"data.shards: no sound sample was found for slot {slot} in {MAX_ATTEMPTS + 1} tries (last: {last}); see "
            f"'recap-ds shards verify {place}'"
        )


def log_damage(path: Path | None, damage: DamagedSample, slot: int) -> None:
    if path is None:
        return
    append_line(path, json.dumps({"shard": damage.shard, "key": damage.key, "what": damage.what, "slot": slot}))


class SlotBatches:
    """Batch sampler: the slots of each micro-batch of one rank, for ``num_steps`` optimizer steps."""

    def __init__(self, start_slot: int, num_steps: int, sizes: BatchSizes, rank: int):
        assert 0 <= rank < sizes.world, (rank, sizes)
        self._start_slot = start_slot
        self._num_steps = num_steps
        self._sizes = sizes
        self._rank = rank

    def __len__(self) -> int:
        return self._num_steps * self._sizes.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        sizes = self._sizes
        for step in range(self._num_steps):
            first = self._start_slot + step * sizes.total + self._rank * sizes.micro * sizes.accumulation
            for micro in range(sizes.accumulation):
                yield list(range(first + micro * sizes.micro, first + (micro + 1) * sizes.micro))


class BatchLoader(DataLoader):
    """A DataLoader of TransitionBatch that raises a worker's UsageError or RunFailed as the one line it is."""

    def __iter__(self) -> Iterator[TransitionBatch]:
        for item in super().__iter__():
            if isinstance(item, UsageError | RunFailed):
                raise item
            yield unpack(item) if isinstance(item, PackedBatch) else item


def build_train_loader(
    dataset: TransitionDataset,
    config: PiStarRECAPConfig,
    sizes: BatchSizes,
    rank: int,
    *,
    start_slot: int,
    num_steps: int,
    pin_memory: bool,
) -> BatchLoader:
    """``num_steps * sizes.accumulation`` micro-batches of rank ``rank``, from ``start_slot`` on.

    ``pin_memory``: an accelerator will copy the batches. Iterate it once; build another to go elsewhere.
    """
    options = worker_options(config.data) if config.data.num_workers else {}
    return BatchLoader(
        dataset.starting_at(start_slot),
        batch_sampler=SlotBatches(start_slot, num_steps, sizes, rank),
        collate_fn=_to_send if config.data.num_workers else _as_it_is,
        pin_memory=pin_memory,
        **options,
    )


def _as_it_is(batch: TransitionBatch) -> TransitionBatch:
    return batch


def _to_send(item: TransitionBatch | UsageError) -> PackedBatch | UsageError:
    return pack(item) if isinstance(item, TransitionBatch) else item
