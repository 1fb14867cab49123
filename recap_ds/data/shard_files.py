"""Bytes of shards by their number, from a folder or, where the set is remote, from the node's cache.

Files stay open between reads, a few at a time. What a process learns of a shard that cannot be had it keeps: asking a
server again for every sample of it would be slow and change nothing.
"""

import os
from collections import OrderedDict
from pathlib import Path

from recap_ds.data.fetch import FileLost
from recap_ds.data.manifest import ShardEntry
from recap_ds.data.remote_set import RemoteSet

MAX_OPEN_FILES = 64
# An open file keeps its shard in the cache, where a job's many workers would hold more of them than fit.
MAX_OPEN_CACHED_FILES = 1


class ShardUnreadable(Exception):
    """A shard that is missing, or bytes of it that are. The text says how."""


class ShardFiles:
    """Picklable: a copy opens files of its own."""

    def __init__(self, folder: Path, shards: tuple[ShardEntry, ...], remote: RemoteSet | None):
        self._folder = folder
        self._shards = shards
        self._remote = remote
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first
        self._lost: dict[int, str] = {}
        self._checked: set[int] = set()

    def __getstate__(self) -> dict:
        # Descriptors mean nothing in another process.
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, shard: int, num_bytes: int, start: int) -> bytes:
        """Raises ShardUnreadable; RunFailed where a remote shard cannot be fetched now, though it may be there."""
        try:
            data = os.pread(self._descriptor(shard), num_bytes, start)
        except OSError as error:
            raise ShardUnreadable(f"cannot be read ({error.strerror})") from None
        if len(data) < num_bytes:
            raise ShardUnreadable(f"{len(data)} of {num_bytes} bytes are there: the shard is cut short")
        return data

    def mend(self, shard: int) -> bool:
        """Of a shard that gave wrong bytes: True if only our copy was bad, which the next read then fetches again."""
        if self._remote is None or shard in self._lost or shard in self._checked:
            return False
        self._checked.add(shard)
        if shard in self._open:
            os.close(self._open.pop(shard))
        return self._remote.cache.drop_if_changed(self._shards[shard])

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            # Before the new one: making room for it may need the place of this one.
            if len(self._open) == (MAX_OPEN_FILES if self._remote is None else MAX_OPEN_CACHED_FILES):
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._open_shard(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _open_shard(self, shard: int) -> int:
        if self._remote is None:
            return os.open(self._folder / self._shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        if shard not in self._lost:
            try:
                return self._remote.open_shard(self._shards[shard])
            except FileLost as lost:
                self._lost[shard] = str(lost)
        raise ShardUnreadable(f"cannot be fetched: {self._lost[shard]}")
