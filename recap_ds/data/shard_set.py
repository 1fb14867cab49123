"""A folder of shards, opened for reading: every sample's numbers as flat arrays, every sample's bytes by one pread.

Sample ids run through the shards in the manifest's order, 0..N-1. The arrays come from the index files, hold no Python
object per sample (about 100 bytes each) and can be pickled to loader workers. A sample's members stand together in the
tar, so one read fetches them all; the index's crc32 says whether they are what was written.

    N samples   M member suffixes   E episodes
"""

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.draws import identity_of
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.order import KeptSamples, group_by_shard
from recap_ds.data.split import held_out_episodes
from recap_ds.errors import UsageError

MAX_OPEN_FILES = 64
# A sample's members span less than this; the index keeps their places relative to the first one in 32 bits.
MAX_SAMPLE_BYTES = 2**31 - 1


class DamagedSample(Exception):
    """A sample that cannot be read as it was written. The loader replaces it and counts it."""

    def __init__(self, shard: str, key: str, what: str):
        super().__init__(shard, key, what)
        self.shard, self.key, self.what = shard, key, what

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}': {self.what}"


class SampleTable(NamedTuple):
    """One row per sample; ids are those of ``recap_ds.batch``, ``task`` is a position in the manifest's tasks."""

    start: np.ndarray  # [N] int64, first byte of the sample's members in its tar
    offsets: np.ndarray  # [N, M] int32, of each member from ``start``
    sizes: np.ndarray  # [N, M] int32, -1 = the sample lacks the member
    crc32: np.ndarray  # [N] uint32
    source: np.ndarray  # [N] int8
    task: np.ndarray  # [N] int32
    episode: np.ndarray  # [N] int32, into ShardSet.episodes
    frame: np.ndarray  # [N] int32
    episode_length: np.ndarray  # [N] int32
    outcome: np.ndarray  # [N] int8
    control: np.ndarray  # [N] int8
    num_valid: np.ndarray  # [N] int32, not capped by the stored width of an action chunk
    next_offset: np.ndarray  # [N] int32

    @classmethod
    def empty(cls, num_samples: int, num_suffixes: int) -> "SampleTable":
        wide = {"offsets": (num_samples, num_suffixes), "sizes": (num_samples, num_suffixes)}
        kinds = {"start": np.int64, "crc32": np.uint32, "source": np.int8, "outcome": np.int8, "control": np.int8}
        return cls(**{name: np.empty(wide.get(name, num_samples), kinds.get(name, np.int32)) for name in cls._fields})


class ShardSet:
    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        suffixes: tuple[str, ...],
        episodes: list[str],
        shard_starts: np.ndarray,
        table: SampleTable,
    ):
        self.folder = folder
        self.manifest = manifest
        self.suffixes = suffixes  # sorted
        self.episodes = episodes  # names, by the ids of table.episode
        self.shard_starts = shard_starts  # [num_shards + 1] int64, first sample id of each shard
        self.table = table
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
        indices = [_load_index(folder, entry) for entry in manifest.shards]
        suffixes = tuple(sorted({str(suffix) for index in indices for suffix in index.suffixes}))
        shard_starts = np.cumsum([0, *(index.num_samples for index in indices)])
        table = SampleTable.empty(int(shard_starts[-1]), len(suffixes))
        task_ids = {name: i for i, name in enumerate(manifest.tasks)}
        episode_ids: dict[str, int] = {}
        for shard, (entry, index) in enumerate(zip(manifest.shards, indices, strict=True)):
            unknown = [str(task) for task in index.tasks if task not in task_ids]
            if unknown:
                raise _disagreement(folder, entry.name, f"task '{unknown[0]}' is not in the manifest")
            rows = slice(shard_starts[shard], shard_starts[shard + 1])
            for name in table._fields:
                if name not in ("start", "offsets", "sizes", "task", "episode"):
                    getattr(table, name)[rows] = getattr(index, name)
            table.task[rows] = np.array([task_ids[str(task)] for task in index.tasks])[index.task]
            numbers = [episode_ids.setdefault(str(name), len(episode_ids)) for name in index.episodes]
            table.episode[rows] = np.array(numbers)[index.episode]
            _fill_places(folder, entry.name, index, suffixes, table, rows)
        return cls(folder, manifest, suffixes, list(episode_ids), shard_starts, table)

    def __getstate__(self) -> dict:
        # Descriptors mean nothing in another process: it opens its own.
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def num_samples(self) -> int:
        return len(self.table.start)

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.shard_starts, sample, side="right")) - 1

    def identity(self, sample: int) -> int:
        """64 bits that name the sample whatever else the folder holds."""
        return identity_of(self.episodes[self.table.episode[sample]], int(self.table.frame[sample]))

    def held_out(self, fraction: float) -> np.ndarray:
        """[N] bool, True = kept for evaluation: whole episodes, about ``fraction`` of every task's (``split.py``)."""
        task = np.zeros(len(self.episodes), np.int64)
        task[self.table.episode] = self.table.task  # an episode is of one task
        return held_out_episodes(self.episodes, task, fraction)[self.table.episode]

    def training_samples(self, held_out_fraction: float) -> dict[str, KeptSamples]:
        """What training may draw, per source; sources with nothing left are absent."""
        kept = np.flatnonzero(~self.held_out(held_out_fraction))
        shard = np.searchsorted(self.shard_starts, kept, side="right") - 1
        samples = {}
        for name, number in SOURCE_IDS.items():
            rows = self.table.source[kept] == number
            if rows.any():
                samples[name] = group_by_shard(kept[rows], shard[rows])
        return samples

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
    path = folder / entry.name
    if not path.is_file():
        raise UsageError(
            f"{path}: missing, though the manifest lists it; copy it again or run 'recap-ds shards index {folder}'"
        )
    index = ShardIndex.load(ShardIndex.path_of(path))
    if index.num_samples != entry.num_samples:
        raise _disagreement(folder, entry.name, f"{index.num_samples} samples, the manifest says {entry.num_samples}")
    if (index.source != SOURCE_IDS[entry.source]).any():
        raise _disagreement(folder, entry.name, f"samples of another source than {entry.source}")
    return index


def _fill_places(
    folder: Path, name: str, index: ShardIndex, suffixes: tuple[str, ...], table: SampleTable, rows: slice
) -> None:
    present = index.sizes >= 0
    start = np.where(present, index.offsets, np.iinfo(np.int64).max).min(axis=1)
    end = np.where(present, index.offsets + index.sizes, 0).max(axis=1)
    if (end - start > MAX_SAMPLE_BYTES).any():
        raise _disagreement(folder, name, f"a sample spans more than {MAX_SAMPLE_BYTES} bytes")
    columns = [suffixes.index(str(suffix)) for suffix in index.suffixes]
    table.start[rows] = start
    table.sizes[rows] = -1
    table.offsets[rows] = 0
    table.sizes[rows, columns] = index.sizes
    table.offsets[rows, columns] = np.where(present, index.offsets - start[:, None], 0)


def _disagreement(folder: Path, name: str, what: str) -> UsageError:
    return UsageError(f"{folder / name}: {what}; rebuild index and manifest with 'recap-ds shards index {folder}'")
