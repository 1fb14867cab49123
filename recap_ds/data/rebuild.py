"""Indices and manifest of tars that are already there: ``recap-ds shards index FOLDER``.

For shards made elsewhere, and for folders whose indices or manifest were lost. One pass over every tar, in parallel
over tars. What a tar cannot say (the td_horizon it was written with, the order of its tasks) comes from the manifest
that is replaced, or is inferred: the longest window seen, tasks by name. n = samples of a shard, W = stored action
width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.config import SOURCES
from recap_ds.data.index import SHARD_NAME, IndexBuilder, SampleRecord, ShardIndex, members_crc, read_samples
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.npy import npy_array
from recap_ds.data.staging import locked
from recap_ds.data.stats import FeatureStats
from recap_ds.data.survey import count_sources, count_tasks
from recap_ds.data.tar import file_sha256
from recap_ds.errors import UsageError
from recap_ds.files.pool import process_pool
from recap_ds.processing.images import decode_jpeg


@dataclass(frozen=True)
class _Scan:
    """What one tar says."""

    entry: ShardEntry
    index: ShardIndex
    # Keys and values of the manifest that all shards must share.
    shared: dict[str, object]
    cameras: tuple[str, ...]
    has_next: bool
    has_rewards: bool
    prompts: dict[str, str]
    statistics: dict[str, FeatureStats]


def rebuild(folder: str | Path, jobs: int = 1) -> Manifest:
    """Write every index and the manifest anew; the tars are not touched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder")
    with locked(folder):
        paths = sorted(folder.glob("*.tar"), key=_place)
        if not paths:
            raise UsageError(f"{folder}: holds no .tar shards")
        if jobs == 1:
            scans = [_scan(path) for path in paths]
        else:
            with process_pool(jobs) as pool:
                scans = list(pool.map(_scan, paths))
        manifest = _manifest(folder, scans, _replaced_manifest(folder))
        for path, scan in zip(paths, scans, strict=True):
            scan.index.save(ShardIndex.path_of(path))
        manifest.save(folder)
    return manifest


def _place(path: Path) -> tuple[int, int]:
    name = SHARD_NAME.fullmatch(path.name)
    if name is None:
        raise UsageError(f"{path}: rename it <source>-<number>.tar, such as demo-000000.tar")
    return SOURCES.index(name[1]), int(name[2])


def _replaced_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.load(folder)
    except UsageError:
        return None  # missing or damaged: that is what this mends


def _scan(path: Path) -> _Scan:
    builder, records = IndexBuilder(), []
    states, chunks, prompts = [], [], {}
    image_size = None
    for key, record, members, places in read_samples(path):
        builder.add(key, record, places, members_crc(members))
        records.append(record)
        states.append(_float_member(path, key, "state.npy", members, num_axes=1))
        chunks.append(_float_member(path, key, "actions.npy", members, num_axes=2))
        if prompts.setdefault(record.task, record.prompt) != record.prompt:
            raise UsageError(f"{path}: {key}: task '{record.task}' has two prompts; a task has one")
        if image_size is None:
            image_size = _image_side(path, key, members)
        same = (states[-1].shape, chunks[-1].shape, record.fps) == (states[0].shape, chunks[0].shape, records[0].fps)
        if not same or record.source != SHARD_NAME.fullmatch(path.name)[1]:
            raise UsageError(f"{path}: {key} differs from the shard's name or first sample in source, dims or fps")
    if not records:
        raise UsageError(f"{path}: holds no samples; delete it")
    index = builder.build()
    suffixes = set(index.suffixes.tolist())
    width, action_dim = chunks[0].shape
    return _Scan(
        entry=ShardEntry(
            name=path.name,
            source=records[0].source,
            num_samples=len(records),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
        ),
        index=index,
        shared={
            "state_dim": len(states[0]),
            "action_dim": action_dim,
            "action_width": width,
            "fps": records[0].fps,
            "image_size": image_size,
        },
        cameras=tuple(sorted(name[:-4] for name in suffixes if name.endswith(".jpg") and name.count(".") == 1)),
        has_next=_has_next(index, records),
        has_rewards="rewards.npy" in suffixes and bool((_column(index, "rewards.npy") >= 0).all()),
        prompts=prompts,
        statistics={
            "state": FeatureStats.of(np.stack(states)),
            "actions": FeatureStats.of(np.stack([chunk[0] for chunk in chunks])),
        },
    )


def _manifest(folder: Path, scans: list[_Scan], old: Manifest | None) -> Manifest:
    shared, prompts = scans[0].shared, {}
    for scan in scans:
        for key, value in scan.shared.items():
            if value != shared[key]:
                first = scans[0].entry.name
                raise UsageError(f"{folder}: {key} is {value!r} in {scan.entry.name} but {shared[key]!r} in {first}")
        for task, prompt in scan.prompts.items():
            if prompts.setdefault(task, prompt) != prompt:
                raise UsageError(f"{folder}: task '{task}' has two prompts, one of them in {scan.entry.name}")
    longest_window = max(1, *(int(scan.index.next_offset.max()) for scan in scans))
    indices = [scan.index for scan in scans]
    statistics = {}
    for source in SOURCES:
        mine = [scan.statistics for scan in scans if scan.entry.source == source]
        if mine:
            statistics[source] = {name: FeatureStats.merge([part[name] for part in mine]) for name in mine[0]}
    return Manifest(
        cameras=tuple(sorted({camera for scan in scans for camera in scan.cameras})),
        **shared,
        td_horizon=max(longest_window, old.td_horizon if old else 1),
        has_next=all(scan.has_next for scan in scans),
        has_rewards=all(scan.has_rewards for scan in scans),
        tasks=count_tasks(indices, prompts, known=list(old.tasks) if old else []),
        counts=count_sources(indices),
        statistics=statistics,
        shards=tuple(scan.entry for scan in scans),
    )


def _has_next(index: ShardIndex, records: list[SampleRecord]) -> bool:
    needed = np.array([record.needs_next for record in records])
    if not needed.any():
        return True
    return "next_state.npy" in index.suffixes and bool((_column(index, "next_state.npy")[needed] >= 0).all())


def _column(index: ShardIndex, suffix: str) -> np.ndarray:
    return index.offsets[:, index.suffixes.tolist().index(suffix)]


def _float_member(path: Path, key: str, suffix: str, members: dict[str, bytes], num_axes: int) -> np.ndarray:
    if suffix not in members:
        raise UsageError(f"{path}: sample '{key}' has no {key}.{suffix}")
    try:
        array = npy_array(members[suffix])
    except ValueError as error:
        raise UsageError(f"{path}: {key}.{suffix}: {error}") from None
    if array.dtype != np.float32 or array.ndim != num_axes or 0 in array.shape or not np.isfinite(array).all():
        raise UsageError(f"{path}: {key}.{suffix}: expected finite float32 with {num_axes} axes")
    return array


def _image_side(path: Path, key: str, members: dict[str, bytes]) -> int:
    suffix = min((name for name in members if name.endswith(".jpg")), default=None)
    if suffix is None:
        raise UsageError(f"{path}: sample '{key}' has no picture (.jpg)")
    try:
        height, width = decode_jpeg(members[suffix]).shape[:2]
    except ValueError as error:
        raise UsageError(f"{path}: {key}.{suffix}: {error}") from None
    if height != width:
        raise UsageError(f"{path}: {key}.{suffix} is {width}x{height}; stored pictures are square")
    return height
