"""Whole remote shards on the disks of a node, shared by all its processes.

    shards/<sha256>.tar    a shard whose every byte was checked, under the checksum of the manifest that lists it
           <sha256>.part   one on its way;  <sha256>.lock  held by the process that fetches it
           .lock           held while room is made

Locks are the kernel's, so a process that dies leaves none; what it was fetching is fetched again. A reader holds a
shared lock on the shard it reads, and the least recently used of the others go when room is needed: the limit is
exceeded only where every shard is being read at that moment.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recap_ds.config import DataConfig
from recap_ds.data.fetch import fetch_file
from recap_ds.data.manifest import ShardEntry
from recap_ds.data.remote import Origin
from recap_ds.data.tar import file_sha256
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.lock import NOT_SUPPORTED, open_locked
from recap_ds.files.records import FileRecord

DEFAULT_FOLDER = "~/.cache/recap_ds"


@dataclass(frozen=True)
class ShardCache:
    folder: Path
    max_bytes: int
    patience_seconds: float

    @classmethod
    def of(cls, data: DataConfig) -> "ShardCache":
        folder = Path(data.cache_folder or DEFAULT_FOLDER).expanduser()
        return cls(folder, int(data.max_cache_gib * 2**30), data.fetch_patience_seconds)

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def prepare(self) -> None:
        """Make the folders; UsageError where that cannot be, or where the file system keeps no locks."""
        with self.usable():
            self.shards.mkdir(parents=True, exist_ok=True)
            with held(self.shards / ".lock"):
                pass

    def path_of(self, entry: ShardEntry) -> Path:
        return self.shards / f"{entry.sha256}.tar"

    def open(self, origin: Origin, entry: ShardEntry) -> int:
        """A descriptor of the whole shard. Until it is closed, the shard stays where it is.

        Raises FileLost and RunFailed.
        """
        with self.usable():
            while True:
                try:
                    return self._open_kept(entry)
                except FileNotFoundError:
                    self._fetch(origin, entry)

    def drop_if_changed(self, entry: ShardEntry) -> bool:
        """Did our copy go bad on the disk? Then it is removed, to be fetched again."""
        path = self.path_of(entry)
        try:
            if file_sha256(path) == entry.sha256:
                return False
            path.unlink()
        except FileNotFoundError:
            pass  # somebody else saw it too
        return True

    def _open_kept(self, entry: ShardEntry) -> int:
        path = self.path_of(entry)
        descriptor = open_locked(path, os.O_RDONLY, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size != entry.bytes:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        os.utime(descriptor)  # used just now
        return descriptor

    def _fetch(self, origin: Origin, entry: ShardEntry) -> None:
        path = self.path_of(entry)
        part = path.with_suffix(".part")

        def problem(record: FileRecord) -> str | None:
            if record == (entry.bytes, entry.sha256):
                return None
            more = "more than " if record.bytes > entry.bytes else ""
            what = f"{more}{min(record.bytes, entry.bytes)} of {entry.bytes} bytes came"
            return what if record.bytes != entry.bytes else "its sha256 is not the one in the manifest"

        # Somebody may clear caches while a run goes on.
        self.shards.mkdir(parents=True, exist_ok=True)
        with held(path.with_suffix(".lock")):
            if path.exists():  # another process fetched it while this one waited
                return
            self._make_room(entry)
            try:
                with open(part, "r+b") as file:
                    fetch_file(
                        origin,
                        entry.name,
                        file,
                        max_bytes=entry.bytes,
                        patience_seconds=self.patience_seconds,
                        problem=problem,
                    )
                    # Or a power cut could leave the name without the bytes.
                    os.fsync(file.fileno())
                os.replace(part, path)
                sync_folder(self.shards)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, entry: ShardEntry) -> None:
        """Remove what is least recently used until ``entry`` fits, and lay out its file so that others count it."""
        part = self.path_of(entry).with_suffix(".part")
        with held(self.shards / ".lock"):
            kept = [file for file in self._sweep() if file.path != part]
            excess = sum(file.num_bytes for file in kept) + entry.bytes - self.max_bytes
            for file in sorted(kept, key=lambda file: file.used_at):
                if excess <= 0:
                    break
                if file.path.suffix == ".tar" and _remove_unused(file.path):
                    excess -= file.num_bytes
            with open(part, "wb") as file:
                file.truncate(entry.bytes)

    def _sweep(self) -> list["_Kept"]:
        """What is there, without what processes left that died while they fetched it."""
        kept = []
        for path in self.shards.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            try:
                if path.suffix == ".part" and _is_abandoned(path):
                    path.unlink()
                    continue
                status = path.stat()
            except FileNotFoundError:
                continue
            kept.append(_Kept(path, status.st_size, status.st_mtime_ns))
        return kept

    @contextmanager
    def usable(self) -> Iterator[None]:
        """What the disk refuses in here is told in one line."""
        try:
            yield
        except OSError as error:
            if error.errno in NOT_SUPPORTED:
                raise UsageError(
                    f"data.cache_folder: {self.folder} is on a file system that keeps no locks; name a folder on a "
                    "disk of the node"
                ) from None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunFailed(
                    f"data.cache_folder: {self.folder}: {error.strerror}; lower data.max_cache_gib "
                    f"({self.max_bytes / 2**30:g}) or name a larger disk"
                ) from None
            raise UsageError(f"data.cache_folder: {self.folder} cannot be used ({error.strerror})") from None


class _Kept(NamedTuple):
    path: Path
    num_bytes: int
    used_at: int  # nanoseconds


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for the lock at ``path``, a file of no other use that stays."""
    descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _remove_unused(path: Path) -> bool:
    """False where somebody reads it."""
    try:
        descriptor = open_locked(path, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    try:
        path.unlink()
    finally:
        os.close(descriptor)
    return True


def _is_abandoned(part: Path) -> bool:
    try:
        descriptor = open_locked(part.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.close(descriptor)
    return True
