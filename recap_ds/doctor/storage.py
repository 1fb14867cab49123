"""Can checkpoints be trusted to this folder: write speed, flush, rename, symlink, lock, free space.

The same calls that a checkpoint's commit makes. Everything happens in a folder of its own, which is removed.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from recap_ds.doctor.page import Finding, fail, ok, warn
from recap_ds.files.atomic import sync_folder, write_file

BLOCK_BYTES = 8 * 2**20
NUM_BLOCKS = 32
SLOW_BYTES_PER_SECOND = 100e6  # a 3B model with its optimizer, 36 GB, would take six minutes
LOW_BYTES = 100 * 2**30  # two checkpoints of a 3B model, and an export
MIN_BYTES = 2 * NUM_BLOCKS * BLOCK_BYTES


def existing_parent(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that is there: a run makes the rest."""
    folder = folder.resolve()
    while not folder.is_dir():
        if folder.exists():
            return folder
        folder = folder.parent
    return folder


def storage_findings(folder: Path) -> list[Finding]:
    place = existing_parent(folder)
    where = str(place)
    if not place.is_dir():
        return [fail("run folder", f"{where} is a file", "choose another --run-folder (runs_dir, name)")]
    try:
        with tempfile.TemporaryDirectory(prefix=".recap-ds-doctor-", dir=place) as scratch:
            return [*_commit_findings(Path(scratch), where), _speed_finding(Path(scratch), where)]
    except OSError as error:
        what = f"{where} cannot be written ({error.strerror or error})"
        return [fail("run folder", what, "choose another runs_dir, or mend its permissions, quota or mount")]


def _commit_findings(scratch: Path, where: str) -> list[Finding]:
    steps: dict[str, Callable[[Path], None]] = {"rename": _rename, "symlink": _symlink, "lock": _lock}
    findings = []
    for name, step in steps.items():
        try:
            step(scratch)
        except (OSError, AssertionError) as error:
            what = f"{name} does not work in {where} ({error})"
            mend = "put runs_dir on a POSIX file system (Lustre: mount with -o flock), not an object store"
            findings.append(fail("run folder", what, mend))
    return findings or [ok("run folder", f"{where}: whole-file rename, folder rename, symlink and lock work")]


def _rename(scratch: Path) -> None:
    """A file takes the place of another, a folder gets its final name, and both last."""
    write_file(scratch / "file", b"old")
    write_file(scratch / "file", b"new")
    assert (scratch / "file").read_bytes() == b"new", "a replaced file still shows its old content"
    (scratch / "step.tmp").mkdir()
    os.rename(scratch / "step.tmp", scratch / "step")
    sync_folder(scratch)


def _symlink(scratch: Path) -> None:
    for target in ("step_1", "step_2"):
        (scratch / ".latest").symlink_to(target)
        os.replace(scratch / ".latest", scratch / "latest")
    assert os.readlink(scratch / "latest") == "step_2", "a replaced symlink still shows its old target"


def _lock(scratch: Path) -> None:
    with (scratch / ".lock").open("w") as first, (scratch / ".lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise AssertionError("two processes could both lock one file")


def _speed_finding(scratch: Path, where: str) -> Finding:
    free = shutil.disk_usage(scratch).free
    space = f"{free / 1e9:,.0f} GB free"
    if free < MIN_BYTES:
        return fail("disk space", f"{space} in {where}", "make room, or choose another runs_dir")
    speed, flush_seconds = write_speed(scratch / "block", BLOCK_BYTES, NUM_BLOCKS)
    what = f"writes {speed / 1e6:,.0f} MB/s to {where}, a small flush takes {flush_seconds * 1e3:.1f} ms, {space}"
    if speed < SLOW_BYTES_PER_SECOND:
        return warn("disk speed", what, "a checkpoint of a 3B model (36 GB) takes minutes: save less often")
    if free < LOW_BYTES:
        return warn("disk speed", what, "a 3B model's checkpoint with its optimizer is 36 GB: checkpoint.keep_last")
    return ok("disk speed", what)


def write_speed(path: Path, block_bytes: int, num_blocks: int) -> tuple[float, float]:
    """(bytes per second of a long write until it is on the disk, seconds of a small one)."""
    block = os.urandom(block_bytes)  # a disk that compresses must not look faster than it is
    with open(path, "wb") as file:
        start = time.perf_counter()
        for _ in range(num_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        file.write(b"end")
        file.flush()
        os.fsync(file.fileno())
        flushed = time.perf_counter()
    return num_blocks * block_bytes / (written - start), flushed - written
