"""Files that grow by lines, on disks that may be full for a while."""

import os
import sys
from pathlib import Path


def append_line(path: Path, line: str) -> None:
    """Add a line by one write to a file opened for appending: lines of several processes do not mix.

    For lists that people read. One rank that raised would leave the others waiting, so where the disk refuses, the line
    goes to stderr instead.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}): {line}", file=sys.stderr)


class LineFile:
    """Lines appended by one process, each at once; what the disk refuses is kept and written before the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def add(self, line: str) -> str | None:
        """Why the line is not in the file yet; None if it is."""
        self._unwritten += f"{line}\n".encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return f"{self._path} cannot be written ({error.strerror})"
        return None

    def close(self) -> None:
        self._file.close()
