"""What checkpoints a run has, whether they are whole, and which of them may go. One process, no engine."""

import shutil
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import BaseRecord
from recap_ds.checkpoint.record import CheckpointRecord, name_problems, verify_checkpoint
from recap_ds.checkpoint.retention import steps_let_go
from recap_ds.config import CheckpointConfig
from recap_ds.errors import UsageError
from recap_ds.files.lock import lock_folder
from recap_ds.files.records import file_problems, size_problems


class CheckpointEntry(NamedTuple):
    step: int
    folder: Path
    bytes: int  # on the disk, whatever the record says
    saved_at: str | None  # UTC, ISO 8601; None where its record cannot be read
    world: int | None
    marks: tuple[str, ...]  # latest, best
    problems: tuple[str, ...]  # none = whole, as far as was looked


class Pruned(NamedTuple):
    removed: list[CheckpointEntry]
    kept: list[CheckpointEntry]
    damaged: list[CheckpointEntry]  # among the kept ones: they count for nothing and are left alone


def checkpoints_of(run: Path) -> Path:
    """The folder of checkpoints of a run; UsageError where there is none."""
    for folder in (run / layout.CHECKPOINTS_NAME, run):
        if layout.step_folders(folder):
            return folder
    if layout.parse_step(run.name) is not None:
        raise UsageError(f"RUN {run}: is one checkpoint; name the run it belongs to")
    raise UsageError(f"RUN {run}: {'holds no checkpoint' if run.is_dir() else 'there is no such folder'}")


def list_checkpoints(run: Path, with_checksums: bool = False) -> list[CheckpointEntry]:
    """By step. Without checksums, whole means that every file is there in its size."""
    checkpoints = checkpoints_of(run)
    links = {link: layout.linked_step(checkpoints, link) for link in (layout.LATEST, layout.BEST)}
    return [
        _entry(step, folder, tuple(link for link, linked in links.items() if linked == step), with_checksums)
        for step, folder in layout.step_folders(checkpoints).items()
    ]


def _entry(step: int, folder: Path, marks: tuple[str, ...], with_checksums: bool) -> CheckpointEntry:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        record = CheckpointRecord.load(folder)
    except UsageError as error:
        return CheckpointEntry(step, folder, size, None, None, marks, (str(error),))
    if with_checksums:
        problems = verify_checkpoint(folder)
    else:
        problems = name_problems(folder, record) + size_problems(folder, record.files)
    state = (folder / layout.STATE_NAME).stat().st_mtime
    saved_at = record.saved_at or datetime.fromtimestamp(state, timezone.utc).isoformat(timespec="seconds")
    return CheckpointEntry(step, folder, size, saved_at, record.world, marks, tuple(problems))


def base_problems(run: Path) -> list[str]:
    """What is wrong with the frozen VLM that all checkpoints of ``run`` share, where the run keeps it itself."""
    run = checkpoints_of(run).parent
    if not (run / layout.BASE_RECORD_NAME).is_file():
        return []
    record = BaseRecord.load(run)
    base = run / layout.BASE_NAME
    return [f"{base}: {problem}" for problem in file_problems(base, record.files)] if record.weights == "run" else []


def prune(run: Path, keep: CheckpointConfig, *, with_damaged: bool, dry_run: bool) -> Pruned:
    """Remove what ``keep`` lets go, after reading every byte: only whole checkpoints count as kept ones.

    What ``latest`` and ``best`` point at stays where it is whole, and damaged ones too unless ``with_damaged``.
    """
    checkpoints = checkpoints_of(run)
    lock = None if dry_run else lock_folder(checkpoints.parent)
    if not dry_run and lock is None:
        raise UsageError(f"RUN {run}: a process trains in this folder and prunes by itself; wait for it, or stop it")
    entries = list_checkpoints(run, with_checksums=True)
    damaged = [entry for entry in entries if entry.problems]
    whole = {entry.step: entry for entry in entries if not entry.problems}
    if not whole:
        raise UsageError(f"RUN {run}: none of its checkpoints is whole; nothing is removed")
    marked = {step for step, entry in whole.items() if entry.marks}
    gone = [whole[step] for step in steps_let_go(whole, None, keep) if step not in marked]
    gone += damaged if with_damaged else []
    if lock is not None:
        _remove(gone)
        _mend_links(checkpoints, newest_whole=max(whole))
        lock.close()
    return Pruned(gone, [entry for entry in entries if entry not in gone], [] if with_damaged else damaged)


def _mend_links(checkpoints: Path, newest_whole: int) -> None:
    """Where what they pointed at was damaged and is gone: ``latest`` moves to the newest whole one, ``best`` goes."""
    if layout.linked_step(checkpoints, layout.LATEST) is None:
        layout.set_link(checkpoints, layout.LATEST, newest_whole)
    if layout.linked_step(checkpoints, layout.BEST) is None:
        (checkpoints / layout.BEST).unlink(missing_ok=True)


def _remove(entries: Iterable[CheckpointEntry]) -> None:
    for entry in entries:
        shutil.rmtree(layout.hide_folder(entry.folder))
