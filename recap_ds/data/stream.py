"""Training data as streams, for shard sets that no cache can hold: ``data.streaming``.

webdataset's own pipeline, once per worker and part of the mixture:

    shards in random order --> tar members --> samples --> those to train on, checked --> shuffling pool

Which part fills a slot is as exact as ever (``order.py``); which sample of it is what comes next in the worker that
reads the slot. So another number of ranks or workers gives other batches of the same mixture, and a run that goes on
after a stop begins new streams: every sample comes as often as the others on average, not once per epoch.

Readers (the workers of all ranks) walk one endless row of permutations of a part's shards: of R readers, reader r opens
number r, r + R, r + 2R, ... of it, so they read different shards as long as there are enough.
"""

import copy
import io
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys, tar_file_expander

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler
from recap_ds.data.draws import Purpose, generator, identity_of
from recap_ds.data.fetch import stream_file
from recap_ds.data.index import ShardIndex
from recap_ds.data.loader import TransitionDataset, log_damage
from recap_ds.data.parts import Part
from recap_ds.data.sample import SampleArrays
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.errors import RunFailed, UsageError

# In a row, and no sound sample among them: the set is not worth going on with.
MAX_DAMAGED = 4096


class StreamDataset(TransitionDataset):
    """Map-style over slots like the other, to be asked for each slot once."""

    def __init__(
        self,
        assembler: Assembler,
        config: PiStarRECAPConfig,
        slots_per_step: int,
        rank: int,
        world: int,
        damage_log: Path | None = None,
    ):
        super().__init__(assembler, config, slots_per_step, damage_log)
        if config.data.lanes > 1:
            raise UsageError("data.lanes: streams are not read in lanes; leave it at 1, or set data.streaming=false")
        self._rank, self._world = rank, world
        self._pool_samples = config.data.stream_pool_samples
        self._start_slot = 0
        self._streams: dict[int, Iterator[_Read | DamagedSample]] = {}

    def starting_at(self, slot: int) -> "StreamDataset":
        """A copy with streams of its own, which begin when they are read."""
        other = copy.copy(self)
        other._start_slot, other._streams = slot, {}
        return other

    def names(self, slots: np.ndarray, what: str) -> list[str]:
        return [f"slot {slot}: a streamed sample, whose name is not known: {what}" for slot in slots]

    def _read(self, slot: int, part: int, sample: int) -> tuple[int, SampleArrays, bool]:
        if part not in self._streams:
            self._streams[part] = self._open(self.order.parts[part])
        for num_damaged in range(MAX_DAMAGED):
            read = next(self._streams[part])
            try:
                if isinstance(read, DamagedSample):
                    raise read
                return read.sample, self.assembler.decode(read.sample, read.members), num_damaged > 0
            except DamagedSample as damage:
                log_damage(self._damage_log, damage, slot)
                last = damage
        place = self.assembler.shard_set.place
        raise UsageError(
            f"data.shards: {MAX_DAMAGED} damaged samples in a row (last: {last}); see 'recap-ds shards verify {place}'"
        )

    def _open(self, part: Part) -> "Iterator[_Read | DamagedSample]":
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader = self._rank * num_workers + number
        shards = _ShardRow(self._seed, self._start_slot, part, reader, self._world * num_workers)
        pool_seed = identity_of("stream", self._seed, self._start_slot, part.stream, reader)
        source = _Source(self.assembler.shard_set, part)
        pipeline = DataPipeline(
            shards.walk,
            source.open_shards,
            partial(tar_file_expander, handler=_go_on),
            partial(group_by_keys, lcase=False, handler=_go_on),
            source.pick,
            # It begins with a quarter of the pool: the first batch does not wait for all of it.
            shuffle(self._pool_samples, initial=max(1, self._pool_samples // 4), seed=pool_seed),
        )
        return iter(pipeline)


class _Read(NamedTuple):
    sample: int
    members: dict[str, bytes]


class _ShardRow(NamedTuple):
    seed: int
    start_slot: int
    part: Part
    reader: int
    num_readers: int

    def walk(self) -> Iterator[int]:
        """Places of shards within the part, for ever."""
        num_shards, known, order = len(self.part.samples.shards), -1, np.empty(0, np.int64)
        for number in count(self.reader, self.num_readers):
            epoch, position = divmod(number, num_shards)
            if epoch != known:
                draw = generator(self.seed, Purpose.STREAM_SHARDS, self.start_slot, self.part.stream, epoch)
                known, order = epoch, draw.permutation(num_shards)
            yield int(order[position])


class _Source:
    """Two stages of a pipeline that know of the shard under way: what it should give, and what it gave."""

    def __init__(self, shard_set: ShardSet, part: Part):
        self._shard_set = shard_set
        self._part = part
        self._shard = ""
        self._wanted: dict[str, int] = {}  # key -> sample id, of the shard under way, not seen yet
        self._num_sound = 0
        self._damaged: deque[DamagedSample] = deque()

    def open_shards(self, places: Iterator[int]) -> Iterator[dict]:
        num_barren, shards = 0, self._part.samples.shards
        for place in places:
            entry = self._shard_set.manifest.shards[shards[place]]
            self._shard, before = entry.name, self._num_sound
            keys = ShardIndex.load(ShardIndex.path_of(self._shard_set.folder / entry.name)).keys
            first = self._shard_set.shard_starts[shards[place]]
            self._wanted = {str(keys[i - first]): int(i) for i in self._part.samples.of_shard(place)}
            with closing(_stream(self._shard_set, shards[place])) as stream:
                yield {"url": entry.name, "stream": stream}
            # It has gone by; what was wanted and did not come will not.
            missing = (DamagedSample(entry.name, key, "did not come with its shard") for key in self._wanted)
            self._damaged.extend(missing)
            num_barren = 0 if self._num_sound > before else num_barren + 1
            if num_barren > len(shards):
                raise UsageError(
                    f"data.shards: no sound '{self._part.name}' sample in {num_barren} shards; see 'recap-ds shards "
                    f"verify {self._shard_set.place}'"
                )

    def pick(self, samples: Iterator[dict]) -> Iterator[_Read | DamagedSample]:
        for sample in samples:
            while self._damaged:
                yield self._damaged.popleft()
            # The last one of a shard that broke off comes when the next is open.
            if sample["__url__"] != self._shard or sample["__key__"] not in self._wanted:
                continue
            number = self._wanted.pop(sample["__key__"])
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            if self._shard_set.is_whole(number, members):
                self._num_sound += 1
                yield _Read(number, members)
            else:
                yield self._shard_set.damaged(number, "its bytes do not match the index's crc32")


def _stream(shard_set: ShardSet, shard: int) -> IO[bytes]:
    entry, remote = shard_set.manifest.shards[shard], shard_set.remote
    if remote is not None:
        patience = remote.cache.patience_seconds
        blocks = stream_file(remote.origin, entry.name, max_bytes=entry.bytes, patience_seconds=patience)
        return io.BufferedReader(_Blocks(blocks))
    try:
        return open(shard_set.folder / entry.name, "rb")
    except OSError:
        return io.BytesIO()  # of which nothing comes: its samples are damaged


class _Blocks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _go_on(error: Exception) -> bool:
    """webdataset asks what to do about a shard or a sample that it cannot read: go on with the next."""
    if isinstance(error, RunFailed):
        # It has added to the arguments what it was reading.
        raise RunFailed(str(error.args[0]).partition(" @ <")[0]) from None
    return True
