"""Statistics of a shard folder's own numbers, by source, data set or task: ``recap-ds shards stats``.

Read from the tars, not from the manifest, which they are held against: normalisation is only as good as these figures.
Pictures are not read. n = samples of a shard that belong together.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recap_ds.config import SOURCES
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.npy import npy_array
from recap_ds.data.show import text_table
from recap_ds.data.stats import FeatureStats
from recap_ds.errors import UsageError
from recap_ds.files.pool import process_pool

StatsBy = Literal["source", "dataset", "task"]
FEATURES = ("state", "actions")
# LeRobot's names of the quantiles it stores.
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Of the spread: sums over many rows, taken in another order.
TOLERANCE = 1e-5

GroupStats = dict[str, FeatureStats]  # feature -> statistics


def group_statistics(folder: str | Path, by: StatsBy, jobs: int = 1) -> dict[str, GroupStats]:
    """Group -> feature -> statistics, groups in the manifest's order. UsageError where a sample cannot be read."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    read = partial(_shard_statistics, folder, manifest, by)
    if jobs == 1:
        shards = list(map(read, manifest.shards))
    else:
        with process_pool(jobs) as pool:
            shards = list(pool.map(read, manifest.shards))
    datasets = sorted({name for part in shards for name in part})
    known = {"source": SOURCES, "task": tuple(manifest.tasks), "dataset": datasets}[by]
    found = {name: [part[name] for part in shards if name in part] for name in known}
    return {
        name: {feature: FeatureStats.merge([part[feature] for part in parts]) for feature in FEATURES}
        for name, parts in found.items()
        if parts
    }


def disagreements(folder: str | Path, by_source: dict[str, GroupStats]) -> list[str]:
    """Where the manifest's statistics are not those of the samples, in words."""
    manifest = Manifest.load(folder)
    wrong = []
    for source in SOURCES:
        for feature in FEATURES:
            told = manifest.statistics.get(source, {}).get(feature)
            true = by_source.get(source, {}).get(feature)
            if (told is None) != (true is None) or (told is not None and not _agree(told, true)):
                wrong.append(f"manifest.json: its statistics of {feature} in {source} are not those of the samples")
    return wrong


def describe_statistics(groups: dict[str, GroupStats]) -> str:
    """A table: one line per group, feature and dim."""
    header = ("group", "feature", "dim", "count", "mean", "std", "min", *QUANTILES, "max")
    rows = []
    for group, features in groups.items():
        for feature, stats in features.items():
            columns = [stats.mean, stats.std, stats.min, *map(stats.quantile, QUANTILES.values()), stats.max]
            for dim in range(stats.num_dims):
                rows.append((group, feature, dim, stats.count, *(f"{column[dim]:.4g}" for column in columns)))
    return text_table(header, rows)


def lerobot_statistics(groups: dict[str, GroupStats]) -> dict[str, Any]:
    """Plain JSON: group -> feature, by LeRobot's name, -> what its stats.json holds."""
    names = {"state": "observation.state", "actions": "action"}
    return {
        group: {names[feature]: _lerobot_entry(stats) for feature, stats in features.items()}
        for group, features in groups.items()
    }


def _lerobot_entry(stats: FeatureStats) -> dict[str, Any]:
    moments = {name: list(getattr(stats, name)) for name in ("mean", "std", "min", "max")}
    quantiles = {name: list(stats.quantile(fraction)) for name, fraction in QUANTILES.items()}
    return {**moments, "count": [stats.count], **quantiles}


def _agree(told: FeatureStats, true: FeatureStats) -> bool:
    if (told.count, told.num_dims) != (true.count, true.num_dims):
        return False
    spread = np.maximum(np.subtract(true.max, true.min), np.abs(true.mean)) * TOLERANCE
    close = [np.abs(np.subtract(getattr(told, name), getattr(true, name))) <= spread for name in ("mean", "std")]
    return bool(np.all(close)) and (told.min, told.max) == (true.min, true.max)


def _shard_statistics(folder: Path, manifest: Manifest, by: StatsBy, entry: ShardEntry) -> dict[str, GroupStats]:
    path = folder / entry.name
    index = ShardIndex.load(ShardIndex.path_of(path))
    names, group = _groups(index, entry, by)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        values = {
            "state": _rows(descriptor, path, index, "state.npy", (manifest.state_dim,)),
            "actions": _rows(descriptor, path, index, "actions.npy", (manifest.action_width, manifest.action_dim)),
        }
    finally:
        os.close(descriptor)
    # As the manifest counts: each sample's own frame, which of a chunk is the first row.
    values["actions"] = values["actions"][:, 0]
    return {
        name: {feature: FeatureStats.of(rows[group == number]) for feature, rows in values.items()}
        for number, name in enumerate(names)
        if (group == number).any()
    }


def _groups(index: ShardIndex, entry: ShardEntry, by: StatsBy) -> tuple[list[str], np.ndarray]:
    """Names of the groups, and the group of every sample, [n]."""
    if by == "source":
        return [entry.source], np.zeros(index.num_samples, np.int64)
    if by == "task":
        return index.tasks.tolist(), index.task
    names, number = np.unique([name.rpartition("/")[0] for name in index.episodes.tolist()], return_inverse=True)
    return names.tolist(), number.reshape(-1)[index.episode]


def _rows(descriptor: int, path: Path, index: ShardIndex, suffix: str, shape: tuple[int, ...]) -> np.ndarray:
    """[n, *shape] float32 of every sample."""
    suffixes = index.suffixes.tolist()
    column = suffixes.index(suffix) if suffix in suffixes else None
    rows = np.empty((index.num_samples, *shape), np.float32)
    for row, key in enumerate(index.keys.tolist()):
        try:
            if column is None or index.sizes[row, column] < 0:
                raise ValueError("is missing")
            data = os.pread(descriptor, int(index.sizes[row, column]), int(index.offsets[row, column]))
            array = npy_array(data)
            if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"is not finite float32 {list(shape)}")
        except ValueError as error:
            raise UsageError(f"{path}: {key}.{suffix}: {error}; see 'recap-ds shards verify {path.parent}'") from None
        rows[row] = array
    return rows
