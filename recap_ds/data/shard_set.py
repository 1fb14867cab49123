"""A folder of shards, opened for reading: every sample's numbers as flat arrays, every sample's bytes by one pread.

Sample ids run through the shards in the manifest's order, 0..N-1. ``sample_table.py`` says how the arrays come to be
and how little of them a loader worker copies. A sample's members stand together in the tar, so one read fetches them
all; the index's crc32 says whether they are what was written.

    N samples   E episodes
"""

import os
import zlib
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.draws import identity_of
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.sample_table import SetIndex, disagreement, open_set_index
from recap_ds.data.split import held_out_episodes
from recap_ds.errors import UsageError

MAX_OPEN_FILES = 64


class DamagedSample(Exception):
    """A sample that cannot be read as it was written. The loader replaces it and counts it."""

    def __init__(self, shard: str, key: str, what: str):
        super().__init__(shard, key, what)
        self.shard, self.key, self.what = shard, key, what

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}': {self.what}"


class ShardSet:
    def __init__(self, folder: Path, manifest: Manifest, index: SetIndex):
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self.suffixes = index.suffixes  # sorted
        self.episodes = index.episodes  # names, by the ids of table.episode
        self.shard_starts = index.shard_starts  # [num_shards + 1] int64, first sample id of each shard
        self.table = index.table
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Read the manifest and every index; UsageError where a file is missing or they disagree."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.num_samples:
            raise UsageError(
                f"{folder}: the manifest lists no sample; make shards with 'recap-ds shards make' or 'import'"
            )
        for entry in manifest.shards:
            if not (folder / entry.name).is_file():
                raise UsageError(
                    f"{folder / entry.name}: missing, though the manifest lists it; copy it again or run "
                    f"'recap-ds shards index {folder}'"
                )
        return cls(folder, manifest, open_set_index(folder, manifest, partial(_load_index, folder)))

    def __reduce__(self) -> tuple[object, ...]:
        # Descriptors mean nothing in another process: it opens its own.
        return ShardSet, (self.folder, self.manifest, self.index)

    @property
    def num_samples(self) -> int:
        return len(self.table.start)

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.shard_starts, sample, side="right")) - 1

    def identity(self, sample: int) -> int:
        """64 bits that name the sample whatever else the folder holds."""
        return identity_of(self.episodes[self.table.episode[sample]], int(self.table.frame[sample]))

    def held_out_episodes(self, fraction: float) -> np.ndarray:
        """[E] bool, True = kept for evaluation: about ``fraction`` of every task's episodes (``split.py``)."""
        task = np.zeros(len(self.episodes), np.int32)
        task[self.table.episode] = self.table.task  # an episode is of one task
        return held_out_episodes(self.episodes, task, fraction)

    def held_out(self, fraction: float) -> np.ndarray:
        """[N] bool, the same by sample."""
        return self.held_out_episodes(fraction)[self.table.episode]

    def read_members(self, sample: int) -> dict[str, bytes]:
        """Suffix -> bytes of one sample, checked against its crc32. Raises DamagedSample."""
        shard = self.shard_of(sample)
        start, offsets, sizes = int(self.table.start[sample]), self.table.offsets[sample], self.table.sizes[sample]
        present = np.flatnonzero(sizes >= 0)
        num_bytes = int((offsets + sizes)[present].max())
        try:
            data = os.pread(self._descriptor(shard), num_bytes, start)
        except OSError as error:
            raise self.damaged(sample, f"cannot be read ({error.strerror})") from None
        if len(data) < num_bytes:
            raise self.damaged(sample, f"{len(data)} of {num_bytes} bytes are there: the shard is cut short")
        members, crc = {}, 0
        for i in present:
            member = data[offsets[i] : offsets[i] + sizes[i]]
            crc = zlib.crc32(member, crc)
            members[self.suffixes[i]] = member
        if crc != self.table.crc32[sample]:
            raise self.damaged(sample, "its bytes do not match the index's crc32")
        return members

    def damaged(self, sample: int, what: str) -> DamagedSample:
        shard = self.shard_of(sample)
        path = self.folder / self.manifest.shards[shard].name
        # Keys are not held in memory: only damage reports want them.
        key = ShardIndex.load(ShardIndex.path_of(path)).keys[sample - self.shard_starts[shard]]
        return DamagedSample(path.name, str(key), what)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            path = self.folder / self.manifest.shards[shard].name
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]


def _load_index(folder: Path, entry: ShardEntry) -> ShardIndex:
    index = ShardIndex.load(ShardIndex.path_of(folder / entry.name))
    if index.num_samples != entry.num_samples:
        raise disagreement(folder, entry.name, f"{index.num_samples} samples, the manifest says {entry.num_samples}")
    if (index.source != SOURCE_IDS[entry.source]).any():
        raise disagreement(folder, entry.name, f"samples of another source than {entry.source}")
    return index
