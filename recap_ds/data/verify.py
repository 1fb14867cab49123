"""Is a shard folder still what was written? ``recap-ds shards verify FOLDER_OR_ADDRESS``.

Every byte is read. A finding names the shard, the sample where it can, and what is wrong; nothing is raised for damage.
W = stored action width.
"""

import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import DataConfig
from recap_ds.data.cache import ShardCache
from recap_ds.data.fetch import FileLost
from recap_ds.data.index import SampleRecord, ShardIndex, build_index, members_crc, parse_record
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.npy import npy_array
from recap_ds.data.remote import is_remote
from recap_ds.data.remote_set import RemoteSet
from recap_ds.data.survey import count_sources
from recap_ds.data.tar import file_sha256
from recap_ds.errors import UsageError
from recap_ds.files.pool import process_pool
from recap_ds.processing.images import decode_jpeg


class Finding(NamedTuple):
    shard: str
    key: str  # "" = the shard as a whole
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'{self.key}: ' if self.key else ''}{self.what}"


def verify_shards(place: str | Path, jobs: int = 1, cache: ShardCache | None = None) -> list[Finding]:
    """All findings, in the order of the manifest. UsageError only where there is no readable manifest.

    ``cache``: through which a remote set is read.
    """
    remote = RemoteSet.find(str(place), cache or ShardCache.of(DataConfig())) if is_remote(str(place)) else None
    folder = Path(place) if remote is None else remote.folder
    manifest = Manifest.load(folder) if remote is None else remote.manifest
    if remote is not None:
        remote.fetch_indices()  # those that are lost are found missing
    check = partial(_verify_shard, folder, manifest, remote)
    if jobs == 1:
        per_shard = [check(entry) for entry in manifest.shards]
    else:
        with process_pool(jobs) as pool:
            per_shard = list(pool.map(check, manifest.shards))
    findings = [finding for part in per_shard for finding in part]
    listed = {entry.name for entry in manifest.shards}
    strays = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    findings += [Finding(name, "", "not listed in manifest.json; it is not read") for name in strays]
    return findings or _verify_counts(folder, manifest)


def _verify_counts(folder: Path, manifest: Manifest) -> list[Finding]:
    """Across shards, once each of them is sound."""
    indices = [ShardIndex.load(ShardIndex.path_of(folder / entry.name)) for entry in manifest.shards]
    findings = []
    if count_sources(indices) != manifest.counts:
        findings.append(Finding("manifest.json", "", "its counts are not those of the shards"))
    keys, times = np.unique(np.concatenate([index.keys for index in indices]), return_counts=True)
    findings += [Finding("manifest.json", key, "in more than one shard") for key in keys[times > 1].tolist()]
    return findings


def _verify_shard(folder: Path, manifest: Manifest, remote: RemoteSet | None, entry: ShardEntry) -> list[Finding]:
    if remote is None:
        path = folder / entry.name
        if not path.is_file():
            return [Finding(entry.name, "", "missing")]
        return _verify_tar(path, ShardIndex.path_of(path), manifest, entry)
    try:
        descriptor = remote.open_shard(entry)
    except FileLost as lost:
        return [Finding(entry.name, "", f"cannot be fetched: {lost}")]
    try:
        path = remote.cache.path_of(entry)
        return _verify_tar(path, ShardIndex.path_of(folder / entry.name), manifest, entry)
    finally:
        os.close(descriptor)


def _verify_tar(path: Path, index_path: Path, manifest: Manifest, entry: ShardEntry) -> list[Finding]:
    findings = []
    size = path.stat().st_size
    if size != entry.bytes:
        findings.append(Finding(entry.name, "", f"has {size} bytes, the manifest says {entry.bytes}"))
    if file_sha256(path) != entry.sha256:
        findings.append(Finding(entry.name, "", "sha256 differs from the manifest's"))
    try:
        index = ShardIndex.load(index_path)
    except UsageError as error:
        return [*findings, Finding(entry.name, "", str(error))]
    if index.num_samples != entry.num_samples:
        what = f"its index has {index.num_samples} samples, the manifest says {entry.num_samples}"
        findings.append(Finding(entry.name, "", what))
    findings += _verify_samples(path, manifest, entry, index)
    damaged = {finding.key for finding in findings}
    try:
        findings += _compare_indices(entry.name, index, build_index(path), damaged)
    except UsageError as error:
        findings.append(Finding(entry.name, "", str(error).removeprefix(f"{path}: ")))
    return findings


def _verify_samples(path: Path, manifest: Manifest, entry: ShardEntry, index: ShardIndex) -> list[Finding]:
    findings = []
    suffixes = index.suffixes.tolist()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for row, key in enumerate(index.keys.tolist()):
            members = {
                suffix: os.pread(descriptor, int(size), int(offset))
                for suffix, offset, size in zip(suffixes, index.offsets[row], index.sizes[row], strict=True)
                if offset >= 0
            }
            if members_crc(members) != index.crc32[row]:
                findings.append(Finding(entry.name, key, "crc32 differs from the index's"))
                continue
            try:
                record = parse_record(path, key, members.get("json", b""))
            except UsageError as error:
                findings.append(Finding(entry.name, key, str(error).removeprefix(f"{path}: ")))
                continue
            if _ids(record) != (index.source[row], index.outcome[row], index.control[row]):
                findings.append(Finding(entry.name, key, "source, outcome or control differ from the index's"))
            findings += [Finding(entry.name, key, what) for what in sample_faults(manifest, entry, record, members)]
    finally:
        os.close(descriptor)
    return findings


def _ids(record: SampleRecord) -> tuple[int, int, int]:
    return SOURCE_IDS[record.source], OUTCOME_IDS[record.outcome], CONTROL_IDS[record.control]


def sample_faults(manifest: Manifest, entry: ShardEntry, record: SampleRecord, members: dict[str, bytes]) -> list[str]:
    """What is wrong inside one sample whose bytes are the ones that were written."""
    faults = []
    if record.source != entry.source:
        faults.append(f"source is {record.source} in a shard of {entry.source}")
    if record.task not in manifest.tasks or record.episode_length > manifest.tasks[record.task].longest:
        faults.append(f"task '{record.task}' or its episode's length is not in the manifest")
    if record.next_offset > manifest.td_horizon or record.fps != manifest.fps:
        faults.append("next_offset or fps do not fit the manifest's td_horizon and fps")
    shapes = {"state.npy": (manifest.state_dim,), "actions.npy": (manifest.action_width, manifest.action_dim)}
    pictures = []
    if manifest.has_rewards:
        shapes["rewards.npy"] = (manifest.action_width,)
    if manifest.has_next and record.needs_next:
        shapes["next_state.npy"] = (manifest.state_dim,)
        # A camera a sample lacks is masked, then and now.
        pictures = [f"{camera}.next.jpg" for camera in manifest.cameras if f"{camera}.jpg" in members]
    if not any(f"{camera}.jpg" in members for camera in manifest.cameras):
        faults.append("no picture of any of the manifest's cameras")
    for suffix, shape in shapes.items():
        faults += _array_faults(suffix, members, shape, record)
    for suffix in sorted({*pictures, *(suffix for suffix in members if suffix.endswith(".jpg"))}):
        faults += _picture_faults(suffix, members, manifest.image_size)
    return faults


def _array_faults(suffix: str, members: dict[str, bytes], shape: tuple[int, ...], record: SampleRecord) -> list[str]:
    if suffix not in members:
        return [f"{suffix} is missing"]
    try:
        array = npy_array(members[suffix])
    except ValueError as error:
        return [f"{suffix}: {error}"]
    if array.dtype != np.float32 or array.shape != shape:
        return [f"{suffix} is {array.dtype} {list(array.shape)}, expected float32 {list(shape)}"]
    if not np.isfinite(array).all():
        return [f"{suffix} is not finite"]
    if suffix in ("actions.npy", "rewards.npy") and array[record.num_valid :].any():
        return [f"{suffix} is not zero after its {record.num_valid} valid frames"]
    return []


def _picture_faults(suffix: str, members: dict[str, bytes], image_size: int) -> list[str]:
    if suffix not in members:
        return [f"{suffix} is missing"]
    try:
        shape = decode_jpeg(members[suffix]).shape
    except ValueError as error:
        return [f"{suffix}: {error}"]
    return [] if shape == (image_size, image_size, 3) else [f"{suffix} is {shape[1]}x{shape[0]}, not {image_size} px"]


def _compare_indices(shard: str, stored: ShardIndex, rebuilt: ShardIndex, damaged: set[str]) -> list[Finding]:
    """``damaged``: samples already reported, and "" where the shard as a whole was."""
    if stored.keys.tolist() != rebuilt.keys.tolist():
        return [Finding(shard, "", "its index lists other samples than the tar holds")]
    wrong = [
        f.name for f in fields(ShardIndex) if not np.array_equal(getattr(stored, f.name), getattr(rebuilt, f.name))
    ]
    if wrong and not damaged:
        return [Finding(shard, "", f"its index disagrees with the tar in {', '.join(wrong)}")]
    return []
