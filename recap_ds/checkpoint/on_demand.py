"""An export of whatever a user calls a checkpoint: the export itself, or one made next to the run and kept.

There is no process group yet: rank 0 makes it, the others wait for the folder, which appears complete. Its name has a
hash of the checkpoint: a run that was wound back and saves a step again gets another export.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.checkpoint.layout import STATE_NAME, resolve_checkpoint, run_of
from recap_ds.distributed.runtime import RankInfo, wait_for_file
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.records import record_file
from recap_ds.models.export_format import EXPORT_NAME

EXPORTS_NAME = "exports"
WAIT_SECONDS = 1800.0
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def export_of(checkpoint: str | Path, info: RankInfo) -> Path:
    """``checkpoint``: an export, a run, a step folder, latest or best. UsageError where it is none of them."""
    path = Path(checkpoint)
    if (path / EXPORT_NAME).is_file():
        return path
    step_folder = resolve_checkpoint(path)
    content = record_file(step_folder / STATE_NAME).sha256[:8]
    out = run_of(step_folder) / EXPORTS_NAME / f"{step_folder.name}-{content}"
    if info.is_main and not (out / EXPORT_NAME).is_file():
        _make(step_folder, out)
    wait_for_file(out / EXPORT_NAME, WAIT_SECONDS, f"--checkpoint {checkpoint}: rank 0 made no export of it")
    return out


def _make(step_folder: Path, out: Path) -> None:
    try:
        out.parent.mkdir(exist_ok=True)
        with _alone(out.parent):
            if not (out / EXPORT_NAME).is_file():
                consolidate(step_folder, out)
    except OSError as error:
        if error.errno in READ_ONLY:
            raise UsageError(
                f"--checkpoint {step_folder}: its run cannot be written to ({error.strerror}); make an export "
                f"elsewhere with recap-ds consolidate {step_folder} OUT, and name OUT"
            ) from None
        raise RunFailed(f"{out}: the export cannot be written ({error.strerror or error})") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another job that makes an export of this run, which may be the same one."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
