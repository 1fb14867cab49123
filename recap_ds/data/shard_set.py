"""A folder of shards, opened for reading: every sample's numbers as flat arrays, every sample's bytes by one pread.

Sample ids run through the shards in the manifest's order, 0..N-1. ``sample_table.py`` says how the arrays come to be
and how little of them a loader worker copies. A sample's members stand together in the tar, so one read fetches them
all; the index's crc32 says whether they are what was written.

    N samples   E episodes
"""

import zlib
from functools import partial
from pathlib import Path

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.config import DataConfig
from recap_ds.data.cache import ShardCache
from recap_ds.data.draws import identity_of
from recap_ds.data.index import ShardIndex, members_crc
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.remote import is_remote
from recap_ds.data.remote_set import RemoteSet
from recap_ds.data.sample_table import SetIndex, disagreement, open_set_index
from recap_ds.data.shard_files import ShardFiles, ShardUnreadable
from recap_ds.data.split import held_out_episodes
from recap_ds.errors import UsageError


class DamagedSample(Exception):
    """A sample that cannot be read as it was written. The loader replaces it and counts it."""

    def __init__(self, shard: str, key: str, what: str):
        super().__init__(shard, key, what)
        self.shard, self.key, self.what = shard, key, what

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}': {self.what}"


class ShardSet:
    def __init__(self, folder: Path, manifest: Manifest, index: SetIndex, remote: RemoteSet | None = None):
        self.folder = folder  # manifest, indices and labels; the shards too, unless they are remote
        self.place = str(folder) if remote is None else remote.origin.place  # for messages
        self.manifest = manifest
        self.index = index
        self.suffixes = index.suffixes  # sorted
        self.episodes = index.episodes  # names, by the ids of table.episode
        self.shard_starts = index.shard_starts  # [num_shards + 1] int64, first sample id of each shard
        self.table = index.table
        self.remote = remote  # where the shards come from; None: they lie in the folder
        self._files = ShardFiles(folder, manifest.shards, remote)

    @classmethod
    def open(cls, place: str | Path, data: DataConfig | None = None) -> "ShardSet":
        """Read the manifest and every index; UsageError where they are missing or disagree.

        ``data``: how remote ones are reached, and how much of a local set may be missing. Of remote shards only reading
        will tell.
        """
        data = data or DataConfig()
        remote = RemoteSet.open(place, ShardCache.of(data)) if is_remote(str(place)) else None
        folder = Path(place) if remote is None else remote.folder
        manifest = Manifest.load(folder) if remote is None else remote.manifest
        if not manifest.num_samples:
            raise UsageError(
                f"{place}: the manifest lists no sample; make shards with 'recap-ds shards make' or 'import'"
            )
        if remote is None:
            _check_present(folder, manifest, data.max_damaged_fraction)
        return cls(folder, manifest, open_set_index(folder, manifest, partial(_load_index, folder)), remote)

    def __reduce__(self) -> tuple[object, ...]:
        # A copy in another process opens files of its own.
        return ShardSet, (self.folder, self.manifest, self.index, self.remote)

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
        """Suffix -> bytes of one sample, checked against its crc32.

        Raises DamagedSample; RunFailed where a remote shard cannot be fetched now.
        """
        try:
            return self._read_members(sample)
        except DamagedSample:
            if not self._files.mend(self.shard_of(sample)):
                raise
        return self._read_members(sample)

    def _read_members(self, sample: int) -> dict[str, bytes]:
        shard = self.shard_of(sample)
        start, offsets, sizes = int(self.table.start[sample]), self.table.offsets[sample], self.table.sizes[sample]
        present = np.flatnonzero(sizes >= 0)
        num_bytes = int((offsets + sizes)[present].max())
        try:
            data = self._files.read(shard, num_bytes, start)
        except ShardUnreadable as error:
            raise self.damaged(sample, str(error)) from None
        members, crc = {}, 0
        for i in present:
            member = data[offsets[i] : offsets[i] + sizes[i]]
            crc = zlib.crc32(member, crc)
            members[self.suffixes[i]] = member
        if crc != self.table.crc32[sample]:
            raise self.damaged(sample, "its bytes do not match the index's crc32")
        return members

    def is_whole(self, sample: int, members: dict[str, bytes]) -> bool:
        """Are these the members that were written, and all of them?"""
        expected = {self.suffixes[i] for i in np.flatnonzero(self.table.sizes[sample] >= 0)}
        return members.keys() == expected and members_crc(members) == self.table.crc32[sample]

    def damaged(self, sample: int, what: str) -> DamagedSample:
        shard = self.shard_of(sample)
        path = self.folder / self.manifest.shards[shard].name
        # Keys are not held in memory: only damage reports want them.
        key = ShardIndex.load(ShardIndex.path_of(path)).keys[sample - self.shard_starts[shard]]
        return DamagedSample(path.name, str(key), what)

    def close(self) -> None:
        self._files.close()


def _check_present(folder: Path, manifest: Manifest, max_damaged_fraction: float) -> None:
    """A missing shard is damage like any other, if it is too much of it then before training starts."""
    missing = [entry for entry in manifest.shards if not (folder / entry.name).is_file()]
    num_missing = sum(entry.num_samples for entry in missing)
    if num_missing > max_damaged_fraction * manifest.num_samples:
        raise UsageError(
            f"{folder / missing[0].name}: missing, though the manifest lists it (so are {num_missing} of "
            f"{manifest.num_samples} samples, more than data.max_damaged_fraction={max_damaged_fraction:g}); copy it "
            f"again or run 'recap-ds shards index {folder}'"
        )


def _load_index(folder: Path, entry: ShardEntry) -> ShardIndex:
    index = ShardIndex.load(ShardIndex.path_of(folder / entry.name))
    if index.num_samples != entry.num_samples:
        raise disagreement(folder, entry.name, f"{index.num_samples} samples, the manifest says {entry.num_samples}")
    if (index.source != SOURCE_IDS[entry.source]).any():
        raise disagreement(folder, entry.name, f"samples of another source than {entry.source}")
    return index
