"""One process at a time: advisory locks that end with the process that holds them, however that ends.

The kernel keeps a lock (flock), not the presence of a file, so a killed job leaves nothing to clear away. On NFS the
server keeps it, and lets go of a node that died once its lease has run out or it is back. Some cluster file systems
keep it for one node only, or refuse: the first cannot be told from here.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from recap_ds.errors import UsageError

LOCK_NAME = ".lock"
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_folder(folder: Path) -> IO[str] | None:
    """Held until the file is closed or this process ends; None where another process holds it."""
    lock = (folder / LOCK_NAME).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextmanager
def hold_folder(folder: Path, busy: str) -> Iterator[None]:
    """Make ``folder`` and hold its lock; UsageError where that cannot be, ``busy`` where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    if lock is None:
        raise UsageError(busy)
    with lock:
        yield


@contextmanager
def exclusive(path: Path, what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock at ``path``; UsageError, naming the holder, where another process works on ``what``.

    Where the file system refuses locks that is reported, and the work goes on. The file stays: removing it would let
    two processes lock two files of one name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "unknown"
            raise UsageError(f"{what}: another process works on it ({holder}); wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            report(f"{path}: this file system keeps no locks; see to it that one job at a time works on {what}")
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def open_locked(path: Path, flags: int, kind: int) -> int:
    """Open the file at ``path`` and wait for its lock (fcntl.LOCK_SH or LOCK_EX, with LOCK_NB not waiting).

    Returns a descriptor of the file that is there once the lock is held: one that was removed or replaced meanwhile is
    let go. Raises what open and flock raise, BlockingIOError where somebody else has it and LOCK_NB was asked for.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, kind)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
