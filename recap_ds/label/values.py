"""Pass 1 of a label job: what the critic says of every sample, once, on any number of ranks and without an engine.

A shard is the unit of work and its file the record that it is done: an interrupted job computes only what is missing,
and one that is run again only what was damaged since, or could not be read and now can. What a file holds depends on
its shard, the checkpoint and the batch size alone, so neither the number of ranks nor interruptions can be seen in it
(in float32, on one kind of device).

    B samples
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recap_ds.batch import TransitionBatch, to_device
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import ValuesRecord
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.sweep import SweepBatches, SweepDataset, build_sweep_loader
from recap_ds.data.values import unread_samples, values_problem, write_values
from recap_ds.models.inference_value import PredictedValues

Predict = Callable[[TransitionBatch], PredictedValues]
Report = Callable[[str], None]


def pending_shards(dataset: SweepDataset, shard_set: ShardSet, folder: Path, record: ValuesRecord) -> list[int]:
    """Shards without values of the job, or with samples to read that could not be read before.

    One rank should ask and tell the others: the answer changes as they work.
    """
    return [
        shard
        for shard in range(len(shard_set.manifest.shards))
        if values_problem(shard_set, folder, shard, record) is not None
        or any(dataset.can_read(int(sample)) for sample in unread_samples(shard_set, folder, shard))
    ]


def share_of_rank(shard_set: ShardSet, pending: Sequence[int], rank: int, world: int) -> list[int]:
    """This rank's shards: the largest first, each to the rank that has the fewest samples so far."""
    sizes = np.diff(shard_set.shard_starts)
    load, mine = [0] * world, []
    for shard in sorted(pending, key=lambda shard: (-sizes[shard], shard)):
        least = load.index(min(load))
        load[least] += int(sizes[shard])
        if least == rank:
            mine.append(shard)
    return mine


def write_shard_values(
    dataset: SweepDataset,
    shard_set: ShardSet,
    shards: Sequence[int],
    folder: Path,
    record: ValuesRecord,
    predict: Predict,
    config: PiStarRECAPConfig,
    device: torch.device,
    report: Report,
) -> None:
    """One file per shard of ``shards``, each written when all of its samples are known."""
    if not shards:
        return
    batches = SweepBatches(shard_set, shards, config.label.batch_size)
    # One loader over all shards: its workers read the next shard while this one is being written.
    loader = iter(build_sweep_loader(dataset, batches, config, pin_memory=device.type != "cpu"))
    for number, (shard, sizes) in enumerate(zip(shards, batches.sizes, strict=True), start=1):
        parts = [_predict_rows(next(loader), size, predict, device) for size in sizes]
        value, advantage = (_join(column) for column in zip(*parts, strict=True))
        write_values(shard_set, folder, shard, record, value, advantage)
        report(f"values  {shard_set.manifest.shards[shard].name}  {number}/{len(shards)}")


def _predict_rows(
    host_batch: TransitionBatch, num_samples: int, predict: Predict, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Value [n] and advantage [n] of the batch's samples, on the device; NaN where there is none."""
    batch = to_device(host_batch, device)
    predicted = predict(batch)
    value = torch.where(batch.sample_valid, predicted.value.float(), torch.nan)[:num_samples]
    if predicted.advantage is None:
        return value, None
    return value, torch.where(batch.td_valid, predicted.advantage.float(), torch.nan)[:num_samples]


def _join(parts: Sequence[Tensor | None]) -> np.ndarray | None:
    return None if parts[0] is None else torch.cat(list(parts)).cpu().numpy()
