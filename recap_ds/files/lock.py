"""One process at a time in a folder: an advisory lock that ends with the process, however it ends."""

import fcntl
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"


def lock_folder(folder: Path) -> IO[str] | None:
    """Held until the file is closed or this process ends; None where another process holds it."""
    lock = (folder / LOCK_NAME).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
