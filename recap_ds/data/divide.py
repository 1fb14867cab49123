"""One shard folder becomes several: ``recap-ds shards split SRC OUT --by ...``.

Samples are copied, member by member, into OUT/<part>, in the order they stand in, which is shuffled already. The record
is written anew: fields that another program put beside ours are not carried over. n = samples of a part.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import SOURCES
from recap_ds.data.index import ShardIndex, parse_record
from recap_ds.data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from recap_ds.data.npy import npy_array
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.data.staging import open_staging
from recap_ds.data.stats import FeatureStats
from recap_ds.data.survey import count_sources, count_tasks
from recap_ds.data.tar import TarWriter
from recap_ds.data.writer import slug
from recap_ds.errors import UsageError

SplitBy = Literal["source", "dataset", "task", "outcome", "held-out"]


def split_shards(
    folder: Path, out: Path, by: SplitBy, held_out_fraction: float = 0.0
) -> dict[str, tuple[Path, Manifest]]:
    """Part -> its folder and manifest. ``held_out_fraction`` is that of ``held-out``: the parts are training's own."""
    shard_set = ShardSet.open(folder)
    names, part_of = _parts(shard_set, by, held_out_fraction)
    rows = {name: np.flatnonzero(part_of == number) for number, name in enumerate(names)}
    places = {name: out / slug(name) for name, chosen in rows.items() if len(chosen)}
    for place in places.values():
        if (place / MANIFEST_NAME).exists():
            raise UsageError(f"{place}: holds shards already; split into a new folder")
    try:
        return {name: (place, _write_part(shard_set, rows[name], place)) for name, place in places.items()}
    except DamagedSample as error:
        raise UsageError(f"{folder}: {error}; see 'recap-ds shards verify {folder}'") from None
    finally:
        shard_set.close()


def _parts(shard_set: ShardSet, by: SplitBy, held_out_fraction: float) -> tuple[list[str], np.ndarray]:
    """Names of the parts, and the part of every sample, [N]."""
    table = shard_set.table
    if by == "source":
        return list(SOURCE_IDS), np.asarray(table.source)
    if by == "outcome":
        return list(OUTCOME_IDS), np.asarray(table.outcome)
    if by == "task":
        return list(shard_set.manifest.tasks), np.asarray(table.task)
    if by == "held-out":
        return ["training", "held_out"], shard_set.held_out(held_out_fraction).astype(np.int8)
    owners = [name.rpartition("/")[0] for name in shard_set.episodes]
    names, number = np.unique(owners, return_inverse=True)
    return names.tolist(), number.reshape(-1)[table.episode]


def _write_part(shard_set: ShardSet, rows: np.ndarray, place: Path) -> Manifest:
    largest = max(shard.num_samples for shard in shard_set.manifest.shards)
    shards, indices, statistics = [], [], {}
    with open_staging(place) as staging:
        for source in SOURCES:
            mine = rows[shard_set.table.source[rows] == SOURCE_IDS[source]]
            parts = np.array_split(mine, -(-len(mine) // largest)) if len(mine) else []
            written = [
                _write_shard(shard_set, part, staging.work / f"{source}-{number:06d}.tar")
                for number, part in enumerate(parts)
            ]
            shards += [entry for entry, _, _ in written]
            indices += [index for _, index, _ in written]
            if written:
                statistics[source] = {
                    feature: FeatureStats.merge([stats[feature] for _, _, stats in written])
                    for feature in ("state", "actions")
                }
        manifest = _manifest(shard_set.manifest, shards, indices, statistics)
        staging.commit(manifest, [shard.name for shard in shards])
    return manifest


def _write_shard(
    shard_set: ShardSet, rows: np.ndarray, path: Path
) -> tuple[ShardEntry, ShardIndex, dict[str, FeatureStats]]:
    states, actions = [], []
    keys = _keys(shard_set, rows)
    with TarWriter(path) as tar:
        for sample, key in zip(rows.tolist(), keys, strict=True):
            members = shard_set.read_members(sample)
            record = parse_record(shard_set.folder, key, members.pop("json", b""))
            tar.add(key, record, members)
            states.append(_array(shard_set, sample, members, "state.npy"))
            actions.append(_array(shard_set, sample, members, "actions.npy")[0])
        written = tar.finish()
    written.index.save(ShardIndex.path_of(path))
    source = SOURCES[int(shard_set.table.source[rows[0]])]
    entry = ShardEntry(name=path.name, source=source, num_samples=len(rows), bytes=written.bytes, sha256=written.sha256)
    return entry, written.index, {"state": FeatureStats.of(np.stack(states)), "actions": FeatureStats.of(actions)}


def _keys(shard_set: ShardSet, rows: np.ndarray) -> list[str]:
    """[n], of samples in increasing order; only the indices have them."""
    shard = np.searchsorted(shard_set.shard_starts, rows, side="right") - 1
    keys = []
    for number in np.unique(shard).tolist():
        path = ShardIndex.path_of(shard_set.folder / shard_set.manifest.shards[number].name)
        keys += ShardIndex.load(path).keys[rows[shard == number] - shard_set.shard_starts[number]].tolist()
    return keys


def _array(shard_set: ShardSet, sample: int, members: dict[str, bytes], suffix: str) -> np.ndarray:
    manifest = shard_set.manifest
    shape = (manifest.state_dim,) if suffix == "state.npy" else (manifest.action_width, manifest.action_dim)
    try:
        array = npy_array(members.get(suffix, b""))
    except ValueError as error:
        raise shard_set.damaged(sample, f"{suffix}: {error}") from None
    if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
        raise shard_set.damaged(sample, f"{suffix} is not finite float32 {list(shape)}")
    return array


def _has_all(index: ShardIndex, suffix: str) -> bool:
    return bool((index.sizes[:, index.suffixes.tolist().index(suffix)] >= 0).all())


def _manifest(old: Manifest, shards: Sequence[ShardEntry], indices: Sequence[ShardIndex], statistics: dict) -> Manifest:
    rewarded = ["rewards.npy" in index.suffixes and _has_all(index, "rewards.npy") for index in indices]
    return old.model_copy(
        update={
            "has_rewards": all(rewarded),
            "tasks": count_tasks(indices, {name: task.prompt for name, task in old.tasks.items()}, list(old.tasks)),
            "counts": count_sources(indices),
            "statistics": statistics,
            "shards": tuple(shards),
        }
    )
