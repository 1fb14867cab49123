"""Large arrays that processes map instead of copying: one file per node, in its folder for temporary files.

What a data set of 100 million samples needs in memory is then there once per node, however many ranks and loader
workers read it, and the kernel may drop what is not read. The file is a cache: named by what it was made from, made by
the first process that asks while the others wait, and removed by a later one when nobody has used it for a while. A
process that holds one open keeps a shared lock on it, so that it stays as long as its workers may want to map it.

    header: one line of JSON, {name: [dtype, shape, offset]}; then the arrays' bytes, each at a multiple of ALIGNMENT
"""

import fcntl
import json
import math
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recap_ds.errors import UsageError

# Numbers of so many samples are some 25 MiB: a copy per process is cheaper than a file.
MAX_SAMPLES_IN_MEMORY = 2**18
ALIGNMENT = 4096
KEPT_SECONDS = 7 * 24 * 3600.0
SUFFIX = ".arrays"
LOCK_NAME = "lock"


class Layout(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> "Layout":
        return cls(array.dtype.str, array.shape)


Fill = Callable[[Mapping[str, np.ndarray]], None]  # writes every element of the arrays it is given


class ArrayFile:
    """Read-only arrays by name. Pickled by its path: another process of this node maps the same pages."""

    def __init__(self, path: Path, held: Path | None = None):
        """``held``: the same file as another process holds it, should the path be gone."""
        self.path = path
        # Clearing of temporary files goes by their age and heeds no lock: a run of weeks may find its file unlinked.
        self._file = (path if held is None or path.exists() else held).open("rb")
        fcntl.flock(self._file, fcntl.LOCK_SH)
        try:
            header = json.loads(self._file.readline())
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self.arrays = {
                name: np.frombuffer(mapped, dtype, count=math.prod(shape), offset=offset).reshape(shape)
                for name, (dtype, shape, offset) in header.items()
            }
        except ValueError as error:
            raise UsageError(f"{path}: damaged ({error}); remove it, it will be made again") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayFile, (self.path, Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}"))


Stored = ArrayFile | Mapping[str, np.ndarray]  # a data set's arrays, mapped or in memory


def arrays_of(stored: Stored) -> Mapping[str, np.ndarray]:
    return stored.arrays if isinstance(stored, ArrayFile) else stored


def shared_arrays(name: str, plan: Callable[[], tuple[Mapping[str, Layout], Fill]]) -> ArrayFile:
    """The arrays called ``name``, which stands for all that their numbers depend on; ``plan`` is asked where there are
    none on this node yet."""
    folder = node_folder()
    path = folder / f"{name}{SUFFIX}"
    try:
        with open(folder / LOCK_NAME, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for whoever makes one
            if not path.exists():
                _remove_unused(folder)
                layouts, fill = plan()
                _write(path, layouts, fill)
            os.utime(path)
            return ArrayFile(path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); set TMPDIR to a folder of this node with more room"
        ) from None


def node_folder() -> Path:
    """This user's own: in a folder that anybody may write to, somebody else could have left a file for us."""
    folder = Path(tempfile.gettempdir()) / f"recap_ds-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); set TMPDIR to a folder that can") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder}: is not a folder that only this user may write to; remove it or set TMPDIR")
    return folder


def _write(path: Path, layouts: Mapping[str, Layout], fill: Fill) -> None:
    """Whole or not at all: a process that dies meanwhile leaves a file of another name, which the next one replaces."""
    # Room for offsets as wide as they can get: the header's own length decides where the first array begins.
    end = _aligned(len(_header(layouts, dict.fromkeys(layouts, 2**62))))
    places = {}
    for name, layout in layouts.items():
        places[name] = end
        end += _aligned(math.prod(layout.shape) * np.dtype(layout.dtype).itemsize)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w+b") as file:
            file.write(_header(layouts, places))
            # Not a sparse file: a full disk must be found out here, a mapping would die of it.
            os.posix_fallocate(file.fileno(), 0, end)
            file.flush()
            with mmap.mmap(file.fileno(), end) as mapped:
                _fill_mapped(mapped, layouts, places, fill)
                mapped.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(layouts: Mapping[str, Layout], places: Mapping[str, int]) -> bytes:
    return (json.dumps({name: [*layout, places[name]] for name, layout in layouts.items()}) + "\n").encode()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _fill_mapped(mapped: mmap.mmap, layouts: Mapping[str, Layout], places: Mapping[str, int], fill: Fill) -> None:
    """In a function of its own: the arrays must be gone before the mapping is closed."""
    fill(
        {
            name: np.ndarray(layout.shape, layout.dtype, buffer=mapped, offset=places[name])
            for name, layout in layouts.items()
        }
    )


def _remove_unused(folder: Path) -> None:
    for path in folder.glob(f"*{SUFFIX}"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # in use
            if time.time() - os.fstat(file.fileno()).st_mtime > KEPT_SECONDS:
                path.unlink()
