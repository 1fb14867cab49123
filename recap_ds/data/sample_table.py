"""Every sample's numbers as flat arrays, made from the index files of a shard set.

They hold no Python object per sample or episode and take about 100 bytes a sample. Those of a small set are in memory;
those of a large one are mapped from a file that all processes of a node share (``array_file.py``).

    N samples   M member suffixes   E episodes   J shards
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.data import array_file
from recap_ds.data.array_file import Fill, Layout, Stored, arrays_of, shared_arrays
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.errors import UsageError

# A sample's members span less than this; the table keeps their places relative to the first one in 32 bits.
MAX_SAMPLE_BYTES = 2**31 - 1
FORMAT = "samples-1"


class SampleTable(NamedTuple):
    """One row per sample; ids are those of ``recap_ds.batch``, ``task`` is a position in the manifest's tasks."""

    start: np.ndarray  # [N] int64, first byte of the sample's members in its tar
    offsets: np.ndarray  # [N, M] int32, of each member from ``start``
    sizes: np.ndarray  # [N, M] int32, -1 = the sample lacks the member
    crc32: np.ndarray  # [N] uint32
    source: np.ndarray  # [N] int8
    task: np.ndarray  # [N] int32
    episode: np.ndarray  # [N] int32, into SetIndex.episodes
    frame: np.ndarray  # [N] int32
    episode_length: np.ndarray  # [N] int32
    outcome: np.ndarray  # [N] int8
    control: np.ndarray  # [N] int8
    num_valid: np.ndarray  # [N] int32, not capped by the stored width of an action chunk
    next_offset: np.ndarray  # [N] int32


_KINDS = {"start": np.int64, "crc32": np.uint32, "source": np.int8, "outcome": np.int8, "control": np.int8}
_PLACES = ("start", "offsets", "sizes", "task", "episode")


class Names(Sequence[str]):
    """Strings in two arrays, which can be mapped."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self._text, self._ends = text, ends  # [bytes] uint8, [n] int64

    @staticmethod
    def pack(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [name.encode() for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), np.uint8), ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._text[start : self._ends[number]].tobytes().decode()


class SetIndex:
    """The numbers of a whole shard set. Picklable: a large one as the name of the file that holds it."""

    def __init__(self, suffixes: tuple[str, ...], stored: Stored):
        arrays = arrays_of(stored)
        self._stored = stored
        self.suffixes = suffixes  # sorted
        self.episodes = Names(arrays["episode_text"], arrays["episode_ends"])  # by the ids of table.episode
        self.shard_starts = arrays["shard_starts"]  # [J + 1] int64, first sample id of each shard
        self.table = SampleTable(**{name: arrays[name] for name in SampleTable._fields})

    def __reduce__(self) -> tuple[object, ...]:
        return SetIndex, (self.suffixes, self._stored)


class _Survey(NamedTuple):
    """What has to be known of all shards before the first row can be written."""

    suffixes: tuple[str, ...]
    episode_ids: dict[str, int]


def open_set_index(folder: Path, manifest: Manifest, load: Callable[[ShardEntry], ShardIndex]) -> SetIndex:
    """``load`` reads one shard's index; UsageError where shards and manifest disagree."""
    if manifest.num_samples <= array_file.MAX_SAMPLES_IN_MEMORY:
        indices = [load(entry) for entry in manifest.shards]
        survey = _survey(indices)
        arrays = {name: np.empty(layout.shape, layout.dtype) for name, layout in _layouts(manifest, survey).items()}
        _fill(folder, manifest, indices, survey, arrays)
        return SetIndex(survey.suffixes, arrays)

    def plan() -> tuple[Mapping[str, Layout], Fill]:
        survey = _survey(map(load, manifest.shards))
        return (
            _layouts(manifest, survey),
            lambda arrays: _fill(folder, manifest, map(load, manifest.shards), survey, arrays),
        )

    stored = shared_arrays(f"{FORMAT}-{_fingerprint(folder, manifest)}", plan)
    names = Names(stored.arrays["suffix_text"], stored.arrays["suffix_ends"])
    return SetIndex(tuple(names), stored)


def _fingerprint(folder: Path, manifest: Manifest) -> str:
    """Another one where any index file was written again, whatever the manifest says."""
    digest = hashlib.sha256(f"{folder.resolve()}\0{manifest.content_hash()}".encode())
    for entry in manifest.shards:
        path = ShardIndex.path_of(folder / entry.name)
        try:
            found = path.stat()
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be read ({error.strerror}); rebuild it with 'recap-ds shards index FOLDER'"
            ) from None
        digest.update(f"\0{entry.name}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _survey(indices: Iterable[ShardIndex]) -> _Survey:
    suffixes: set[str] = set()
    episode_ids: dict[str, int] = {}
    for index in indices:
        suffixes.update(index.suffixes.tolist())
        for name in index.episodes.tolist():
            episode_ids.setdefault(name, len(episode_ids))
    return _Survey(tuple(sorted(suffixes)), episode_ids)


def _names(survey: _Survey) -> dict[str, np.ndarray]:
    episode_text, episode_ends = Names.pack(survey.episode_ids)
    suffix_text, suffix_ends = Names.pack(survey.suffixes)
    return {
        "episode_text": episode_text,
        "episode_ends": episode_ends,
        "suffix_text": suffix_text,
        "suffix_ends": suffix_ends,
    }


def _layouts(manifest: Manifest, survey: _Survey) -> dict[str, Layout]:
    layouts = {name: Layout.of(array) for name, array in _names(survey).items()}
    layouts["shard_starts"] = Layout("<i8", (len(manifest.shards) + 1,))
    return layouts | table_layouts(manifest.num_samples, len(survey.suffixes))


def table_layouts(num_samples: int, num_suffixes: int) -> dict[str, Layout]:
    wide = {"offsets": (num_samples, num_suffixes), "sizes": (num_samples, num_suffixes)}
    return {
        name: Layout(np.dtype(_KINDS.get(name, np.int32)).str, wide.get(name, (num_samples,)))
        for name in SampleTable._fields
    }


def _fill(
    folder: Path,
    manifest: Manifest,
    indices: Iterable[ShardIndex],
    survey: _Survey,
    arrays: Mapping[str, np.ndarray],
) -> None:
    for name, values in _names(survey).items():
        arrays[name][...] = values
    shard_starts = arrays["shard_starts"]
    shard_starts[...] = np.cumsum([0, *(entry.num_samples for entry in manifest.shards)])
    table = SampleTable(**{name: arrays[name] for name in SampleTable._fields})
    task_ids = {name: i for i, name in enumerate(manifest.tasks)}
    for shard, (entry, index) in enumerate(zip(manifest.shards, indices, strict=True)):
        unknown = [task for task in index.tasks.tolist() if task not in task_ids]
        if unknown:
            raise disagreement(folder, entry.name, f"task '{unknown[0]}' is not in the manifest")
        rows = slice(shard_starts[shard], shard_starts[shard + 1])
        for name in table._fields:
            if name not in _PLACES:
                getattr(table, name)[rows] = getattr(index, name)
        table.task[rows] = np.array([task_ids[task] for task in index.tasks.tolist()])[index.task]
        table.episode[rows] = np.array([survey.episode_ids[name] for name in index.episodes.tolist()])[index.episode]
        _fill_places(folder, entry.name, index, survey.suffixes, table, rows)


def _fill_places(
    folder: Path, name: str, index: ShardIndex, suffixes: tuple[str, ...], table: SampleTable, rows: slice
) -> None:
    present = index.sizes >= 0
    start = np.where(present, index.offsets, np.iinfo(np.int64).max).min(axis=1)
    end = np.where(present, index.offsets + index.sizes, 0).max(axis=1)
    if (end - start > MAX_SAMPLE_BYTES).any():
        raise disagreement(folder, name, f"a sample spans more than {MAX_SAMPLE_BYTES} bytes")
    columns = [suffixes.index(suffix) for suffix in index.suffixes.tolist()]
    table.start[rows] = start
    table.sizes[rows] = -1
    table.offsets[rows] = 0
    table.sizes[rows, columns] = index.sizes
    table.offsets[rows, columns] = np.where(present, index.offsets - start[:, None], 0)


def disagreement(folder: Path, name: str, what: str) -> UsageError:
    return UsageError(f"{folder / name}: {what}; rebuild index and manifest with 'recap-ds shards index {folder}'")
