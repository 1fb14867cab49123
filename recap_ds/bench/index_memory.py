"""What the index of a large data set costs a loader worker: one that was made up, of samples that no tar holds.

A real worker takes the samples of batches all over the order from it, with every number of theirs. Private is what each
worker has for itself; the table is mapped, and in memory once per node however many processes read it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from recap_ds.batch import SOURCE_IDS
from recap_ds.config import DataConfig
from recap_ds.data.array_file import Layout, node_folder, shared_arrays
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.order import SampleOrder
from recap_ds.data.parts import training_parts
from recap_ds.data.sample_table import Names, SetIndex, table_layouts
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.workers import worker_options

SAMPLES_PER_SHARD = 4096
FRAMES_PER_EPISODE = 100
SMALL_SAMPLES = 10 * SAMPLES_PER_SHARD
NUM_BATCHES, BATCH_SIZE = 200, 64
MIB = 2**20
# Of ten shards.
SOURCES = ("demo",) * 6 + ("auto",) * 3 + ("intervention",)


class IndexMemory(NamedTuple):
    private_mib: float  # per worker
    table_mib: float  # per node
    resident_mib: float  # per worker, with the pages of the table that it has read


def index_memory(manifest: Manifest, num_samples: int) -> IndexMemory:
    """Beyond what a worker needs for an index of SMALL_SAMPLES. ``manifest``: of the shards that are made more of."""
    small, large = (_measure(manifest, number) for number in (SMALL_SAMPLES, num_samples))
    return IndexMemory(large.private_mib - small.private_mib, large.table_mib, large.resident_mib - small.resident_mib)


def _measure(manifest: Manifest, num_samples: int) -> IndexMemory:
    shard_set, path = _made_set(manifest, num_samples)
    try:
        data = DataConfig(num_workers=1, prefetch_batches=1)
        order = SampleOrder(training_parts(shard_set, data), data, seed=0, slots_per_step=BATCH_SIZE)
        # Half of an epoch apart, over some of them: as scattered as batches can be.
        steps = np.linspace(0, 4 * num_samples // BATCH_SIZE, NUM_BATCHES).astype(np.int64)
        batches = [list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)) for step in steps.tolist()]
        loader = DataLoader(
            _IndexReader(shard_set, order), batch_sampler=batches, collate_fn=_as_it_is, **worker_options(data)
        )
        private, mapped = np.array(list(loader)).max(axis=0)
        return IndexMemory(private, path.stat().st_size / MIB, private + mapped)
    finally:
        path.unlink()


class _IndexReader(Dataset):
    """Per batch of slots: what the worker has in memory once it has read their numbers."""

    def __init__(self, shard_set: ShardSet, order: SampleOrder):
        self._shard_set, self._order = shard_set, order

    def __getitems__(self, slots: list[int]) -> tuple[float, float]:
        samples = self._order.samples(np.asarray(slots, np.int64))[1]
        for column in self._shard_set.table:
            column[samples].sum()
        for sample in samples:
            self._shard_set.identity(sample)
        return _memory_mib()


def _as_it_is(batch: tuple[float, float]) -> tuple[float, float]:
    return batch


def _memory_mib() -> tuple[float, float]:
    """(private, of mapped files) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, mapped = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return private, mapped


def _made_set(manifest: Manifest, num_samples: int) -> tuple[ShardSet, Path]:
    """A shard set without shards, and the file of its table, which is the caller's to remove."""
    name = f"bench-{os.getpid()}-{num_samples}"
    num_shards = -(-num_samples // SAMPLES_PER_SHARD)
    shard_starts = np.minimum(np.arange(num_shards + 1) * SAMPLES_PER_SHARD, num_samples)
    sources = [SOURCES[shard % len(SOURCES)] for shard in range(num_shards)]
    num_suffixes = 3 + 2 * len(manifest.cameras)

    def fill(arrays: Mapping[str, np.ndarray]) -> None:
        for column, values in _fixed(num_samples, shard_starts).items():
            arrays[column][...] = values
        arrays["episode"][...] = np.arange(num_samples) // FRAMES_PER_EPISODE
        arrays["frame"][...] = np.arange(num_samples) % FRAMES_PER_EPISODE
        arrays["episode_length"].fill(FRAMES_PER_EPISODE)
        arrays["num_valid"].fill(1)
        arrays["source"][...] = np.repeat([SOURCE_IDS[source] for source in sources], np.diff(shard_starts))

    layouts = {column: Layout.of(values) for column, values in _fixed(num_samples, shard_starts).items()}
    layouts |= table_layouts(num_samples, num_suffixes)
    file = shared_arrays(name, lambda: (layouts, fill))
    entries = [
        ShardEntry(name=f"{source}-{shard:06d}.tar", source=source, num_samples=number, bytes=0, sha256="0" * 64)
        for shard, (source, number) in enumerate(zip(sources, np.diff(shard_starts).tolist(), strict=True))
    ]
    index = SetIndex(tuple(f"{number}.npy" for number in range(num_suffixes)), file)
    made = manifest.model_copy(update={"shards": tuple(entries)})
    return ShardSet(node_folder(), made, index), file.path


def _fixed(num_samples: int, shard_starts: np.ndarray) -> dict[str, np.ndarray]:
    text, ends = Names.pack(_episode_names(-(-num_samples // FRAMES_PER_EPISODE)))
    return {"episode_text": text, "episode_ends": ends, "shard_starts": shard_starts}


def _episode_names(num_episodes: int) -> Iterator[str]:
    return (f"made/{number:08d}" for number in range(num_episodes))
