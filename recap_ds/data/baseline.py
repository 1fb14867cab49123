"""The best constant policy: mean actions of the training samples, the yardstick of open-loop action errors.

K tasks   S sources   A action dims
"""

from typing import NamedTuple

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.draws import Purpose, generator
from recap_ds.data.sample import read_actions
from recap_ds.data.shard_set import DamagedSample, ShardSet

# Read at most this many samples of each task and source: their mean is then as good a constant as any to within half a
# percent of the squared error. Every rank reads them when a run starts, so more would cost a large set minutes.
MAX_SAMPLES = 256
# Of remote shards a run should fetch those it trains on, not one for each of these samples.
MAX_REMOTE_SHARDS = 8


class MeanActions(NamedTuple):
    """In the robot's own units; rows without samples are 0 with weight 0."""

    mean: np.ndarray  # [K, S, A] float64
    weight: np.ndarray  # [K, S] training samples there are; 0 where none could be read

    def per_task(self, sources: list[str]) -> np.ndarray:
        """[K, A]: mean over the named sources, each counting as often as it occurs; a task without them takes all."""
        rows = [SOURCE_IDS[name] for name in sources]
        named, whole = self._weighted(rows), self._weighted(list(SOURCE_IDS.values()))
        return np.where(self.weight[:, rows].any(axis=1)[:, None], named, whole)

    def _weighted(self, rows: list[int]) -> np.ndarray:
        weight = self.weight[:, rows, None]
        return (self.mean[:, rows] * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0)


def mean_actions(shard_set: ShardSet, held_out_fraction: float, seed: int) -> MeanActions:
    """Over samples that training may draw; every sample counts with its own frame's action."""
    table, manifest = shard_set.table, shard_set.manifest
    training = ~shard_set.held_out(held_out_fraction)
    shape = (len(manifest.tasks), len(SOURCE_IDS))
    mean, weight = np.zeros((*shape, manifest.action_dim)), np.zeros(shape)
    for task, source in np.ndindex(shape):
        ids = np.flatnonzero(training & (table.task == task) & (table.source == source))
        drawn = generator(seed, Purpose.BASELINE_CHOICE, task, source).permutation(ids)
        if shard_set.remote is not None:
            shard = np.searchsorted(shard_set.shard_starts, drawn, side="right")
            _, first_drawn = np.unique(shard, return_index=True)
            drawn = drawn[np.isin(shard, shard[np.sort(first_drawn)[:MAX_REMOTE_SHARDS]])]
        actions = [
            action for sample in drawn[:MAX_SAMPLES] if (action := _own_action(shard_set, int(sample))) is not None
        ]
        if actions:
            mean[task, source] = np.mean(actions, axis=0, dtype=np.float64)
            weight[task, source] = len(ids)
    return MeanActions(mean, weight)


def _own_action(shard_set: ShardSet, sample: int) -> np.ndarray | None:
    try:
        return read_actions(shard_set, sample)[0]
    except DamagedSample:
        return None  # training and evaluation report damage; a mean can do without
