"""Values without a model: whatever a test says the critic thinks of each (episode, frame)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from recap_ds.config import LabelConfig, ValueConfig
from recap_ds.data.label_records import LabelSettings, ValuesRecord
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.values import StoredValues, open_values, read_values, write_values

ValueOf = Callable[[str, int], float]  # (episode, frame)


def made_record(shard_set: ShardSet, **value: Any) -> ValuesRecord:
    """``value``: the critic's, a distributional one's unless it says otherwise."""
    return ValuesRecord(
        checkpoint_hash="c" * 64,
        checkpoint_run="critic",
        checkpoint_step=500,
        manifest_hash=shard_set.manifest.content_hash(),
        precision="float32",
        batch_size=8,
        value=ValueConfig(**{"critic": "distributional", **value}),
        max_length={name: task.longest for name, task in shard_set.manifest.tasks.items()},
    )


def column_of(shard_set: ShardSet, value_of: ValueOf) -> np.ndarray:
    table = shard_set.table
    rows = zip(table.episode.tolist(), table.frame.tolist(), strict=True)
    return np.array([value_of(shard_set.episodes[episode], frame) for episode, frame in rows], np.float32)


def store_values(
    shard_set: ShardSet, tag: str, value: np.ndarray, action_advantage: np.ndarray | None = None, **value_config: Any
) -> StoredValues:
    """Written and read back, as a label job does."""
    record = made_record(shard_set, **value_config)
    folder = open_values(shard_set.folder, tag, record)
    starts = shard_set.shard_starts
    for shard in range(len(shard_set.manifest.shards)):
        rows = slice(starts[shard], starts[shard + 1])
        part = None if action_advantage is None else action_advantage[rows]
        write_values(shard_set, folder, shard, record, value[rows], part)
    return read_values(shard_set, tag)


def made_settings(positive_fraction: float = 0.4, demos: str = "labelled", **label: Any) -> LabelSettings:
    return LabelSettings(label=LabelConfig(**label), positive_fraction=positive_fraction, demos=demos)
