"""How fast shards are read: whole files in sequence, and samples here and there as training reads them.

The kernel is asked to forget each file first (without root it may keep what others use), so that the disk is measured
and not its cache. Bytes only: decoding is the data workers' part.
"""

import os
import time
from pathlib import Path

import numpy as np

from recap_ds.config import DataConfig
from recap_ds.data.remote_set import RemoteSet
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.doctor.page import Finding, fail, ok, warn
from recap_ds.errors import RunFailed, UsageError

BLOCK_BYTES = 2**20
MAX_BYTES = 2 * 2**30
MAX_SECONDS = 5.0
MAX_SAMPLES = 2000
SLOW_SAMPLES_PER_SECOND = 500.0  # one reader; 32 GPUs at three steps of 32 samples a second take 3,000 over 8 nodes


def reading_findings(place: str | Path, data: DataConfig) -> list[Finding]:
    try:
        shard_set = ShardSet.open(place, data)
        if shard_set.remote is not None:
            return [_remote_finding(shard_set, shard_set.remote)]
    except (UsageError, RunFailed) as error:
        return [fail("shards", str(error))]
    folder = shard_set.folder
    paths = [folder / entry.name for entry in shard_set.manifest.shards]
    for path, entry in zip(paths, shard_set.manifest.shards, strict=True):
        if path.stat().st_size != entry.bytes:
            what = f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}"
            return [fail("shards", what, "copy it again")]
    try:
        speed = sequential_speed(paths)
        rate = sample_rate(shard_set)
    except DamagedSample as error:
        return [fail("shards", str(error), f"copy the shard again; 'recap-ds shards verify {folder}' lists all damage")]
    except OSError as error:
        return [fail("shards", f"{folder} cannot be read ({error.strerror})", "see its permissions and its disk")]
    finally:
        shard_set.close()
    what = (
        f"{shard_set.num_samples:,} samples in {len(paths)} shards; {speed / 1e6:,.0f} MB/s in sequence, "
        f"{rate:,.0f} samples/s at random, one reader"
    )
    if rate < SLOW_SAMPLES_PER_SECOND:
        return [warn("shards", what, "copy them to a local disk, or raise data.num_workers and prefetch_batches")]
    return [ok("shards", what)]


def _remote_finding(shard_set: ShardSet, remote: RemoteSet) -> Finding:
    """One shard is fetched, unless it is in the cache already, and one of its samples read."""
    entry = shard_set.manifest.shards[0]
    was_there, start = remote.cache.path_of(entry).exists(), time.perf_counter()
    try:
        shard_set.read_members(0)
    except DamagedSample as error:
        return fail("shards", str(error), f"'recap-ds shards verify {shard_set.place}' lists all damage")
    finally:
        shard_set.close()
    speed = entry.bytes / (time.perf_counter() - start)
    how = "cached already" if was_there else f"one fetched at {speed / 1e6:,.1f} MB/s"
    total = sum(entry.bytes for entry in shard_set.manifest.shards)
    what = (
        f"{shard_set.num_samples:,} samples in {len(shard_set.manifest.shards)} remote shards, {total / 1e9:,.1f} GB; "
        f"{how}, kept in {remote.cache.folder}"
    )
    if total > remote.cache.max_bytes:
        limit = f"data.max_cache_gib={remote.cache.max_bytes / 2**30:g} does not hold them all"
        return warn("shards", f"{what}; {limit}", "raise it, or they are fetched again in every epoch")
    return ok("shards", what)


def sequential_speed(paths: list[Path]) -> float:
    """Bytes per second over as much as fits into the limits."""
    total, start = 0, time.perf_counter()
    for path in paths:
        _forget(path)
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                total += len(block)
                if total >= MAX_BYTES or time.perf_counter() - start > MAX_SECONDS:
                    return total / (time.perf_counter() - start)
    return total / (time.perf_counter() - start)


def sample_rate(shard_set: ShardSet) -> float:
    """Samples per second of one reader, each checked against its crc32. Raises DamagedSample."""
    for entry in shard_set.manifest.shards:
        _forget(shard_set.folder / entry.name)
    count = min(MAX_SAMPLES, shard_set.num_samples)
    start, done = time.perf_counter(), 0
    for sample in np.random.default_rng(0).permutation(shard_set.num_samples)[:count]:
        shard_set.read_members(int(sample))
        done += 1
        if time.perf_counter() - start > MAX_SECONDS:
            break
    return done / (time.perf_counter() - start)


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
