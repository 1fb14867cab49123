"""Write a checkpoint: under an unfinished name, on all ranks, then one rename; never half of one under its own name.

Three parts. ``begin_save`` agrees on a folder; ``write_files`` is this rank's own work and holds no collective, so that
a thread may do it; ``commit_save`` comes when all have succeeded: rank 0 writes ``state.json`` (with every file's size
and checksum), renames the folder, moves ``latest``, and removes what retention no longer keeps. A failure before the
rename, on any rank, leaves everything as it was, removes what was written so far (the disk may be full) and raises the
same error on every rank.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.agreement import gather_objects, on_every_rank, on_main
from recap_ds.checkpoint.retention import steps_let_go
from recap_ds.checkpoint.snapshot import Snapshot, take_snapshot
from recap_ds.checkpoint.tile_file import write_tile_file
from recap_ds.config import CheckpointConfig
from recap_ds.distributed.engine import DeepSpeedEngine
from recap_ds.distributed.native_save import NativeSave, save_native
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import FileRecord, record_files
from recap_ds.files.tensors import TensorSource, write_tensor_file

Files = dict[str, FileRecord]


class SaveFailed(RunFailed):
    """A disk or a folder failed; the run itself is sound and could go on."""

    def __init__(self, checkpoints: Path, step: int, reason: str) -> None:
        super().__init__(
            f"{checkpoints}: saving step {step} failed ({reason}); free space there or make the folder writable, "
            "then start the run again: it goes on from its newest checkpoint"
        )
        self.reason = reason


class UnfinishedSave(NamedTuple):
    """All that is to become a checkpoint, on one rank."""

    checkpoints: Path
    snapshot: Snapshot
    native: NativeSave | None
    best: bool

    @property
    def step(self) -> int:
        return self.snapshot.record.step

    @property
    def folder(self) -> Path:
        return self.checkpoints / layout.unfinished_name(self.step)


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    runtime: Runtime,
    engine: DeepSpeedEngine,
    shadows: Mapping[str, Shadow],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    keep: CheckpointConfig,
    best: bool = False,
) -> Path:
    """``checkpoints/step_...``, complete. ``state`` is JSON and ``tensors`` are small; rank 0's are written.

    ``checkpoints`` lies on a file system that all ranks share; its parent must exist.

    Only between optimizer steps. Raises SaveFailed on every rank where a disk or a folder fails.
    Collective: every rank must call.
    """
    snapshot = take_snapshot(engine, shadows, runtime.info, step, state, tensors)
    save = begin_save(checkpoints, snapshot, runtime, engine, keep, best)
    return commit_save(save, lambda: write_files(save, runtime.info.rank), runtime, keep)


def begin_save(
    checkpoints: Path,
    snapshot: Snapshot,
    runtime: Runtime,
    engine: DeepSpeedEngine,
    keep: CheckpointConfig,
    best: bool,
) -> UnfinishedSave:
    """An empty folder and what is to be written there. DeepSpeed's own files are written now: they need all ranks.

    Collective: every rank must call.
    """
    step = snapshot.record.step
    unfinished = checkpoints / layout.unfinished_name(step)
    with _leaving_nothing_unfinished(unfinished, step, runtime):
        on_main(runtime, lambda: _start(checkpoints, unfinished))
        native = save_native(engine, unfinished / layout.NATIVE_NAME) if keep.also_deepspeed else None
    return UnfinishedSave(checkpoints, snapshot, native, best)


def write_files(save: UnfinishedSave, rank: int) -> Files:
    """This rank's files, flushed to the disk. No collective in here, and nothing that trains is touched."""
    name = layout.rank_file_name(rank)
    files = {name: write_tile_file(save.folder / name, save.snapshot.tiles)}
    if rank == 0:
        sources = {name: TensorSource.of(tensor) for name, tensor in save.snapshot.tensors.items()}
        files[layout.SHARED_NAME] = write_tensor_file(save.folder / layout.SHARED_NAME, sources)
    if save.native is not None:
        paths = save.native.paths()
        names = (str(path.relative_to(save.folder)) for path in paths)
        files |= dict(zip(names, record_files(paths), strict=True))
    return files


def commit_save(save: UnfinishedSave, written: Callable[[], Files], runtime: Runtime, keep: CheckpointConfig) -> Path:
    """Make it a checkpoint. ``written`` gives what ``write_files`` gave, or raises what it raised.

    Collective: every rank must call.
    """

    def finish() -> str:
        _check_shared(save.folder, files)
        save.snapshot.record.model_copy(update={"files": files}).save(save.folder)
        return str(_commit(save.folder, save.checkpoints / layout.step_name(save.step)))

    with _leaving_nothing_unfinished(save.folder, save.step, runtime):
        mine = on_every_rank(runtime, written)
        gathered = gather_objects(runtime, mine)
        files = {name: FileRecord(*record) for rank_files in gathered for name, record in rank_files.items()}
        folder = Path(on_main(runtime, finish))
        # From here on the checkpoint exists, whatever happens to links and old ones.
        on_main(runtime, lambda: _publish(save, keep))
    return folder


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what a run that was killed while saving left behind, and what retention let go.

    One process only, and while no run writes there. A folder that is not there holds nothing.
    """
    for folder in checkpoints.glob(".step_*"):
        _try_remove(folder)


@contextmanager
def _leaving_nothing_unfinished(unfinished: Path, step: int, runtime: Runtime) -> Iterator[None]:
    """Where saving fails, rank 0 removes what is there so far; a full disk or a read-only folder is named.

    RunFailed and UsageError come out of an agreement: all ranks are here, so no rank still writes. Any other exception
    may be one rank's alone: its folder stays until the next start.
    """
    try:
        yield
    except (RunFailed, UsageError) as error:
        if runtime.info.is_main:
            _try_remove(unfinished)
        if isinstance(error, UsageError):
            raise
        raise SaveFailed(unfinished.parent, step, str(error)) from error


def _start(checkpoints: Path, unfinished: Path) -> None:
    checkpoints.mkdir(exist_ok=True)  # not its parents: an unmounted disk would be written beside its mount
    remove_unfinished(checkpoints)
    unfinished.mkdir()


def _check_shared(unfinished: Path, files: Mapping[str, FileRecord]) -> None:
    for name, record in files.items():
        path = unfinished / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise UsageError(
                f"runs_dir: rank 0 does not see {path} as another rank wrote it; name a folder on a file system that "
                "all nodes share"
            )


def _commit(unfinished: Path, folder: Path) -> Path:
    for inner in {path.parent for path in unfinished.rglob("*")}:
        sync_folder(inner)
    if folder.exists():  # a damaged one that resume passed over, or the same step saved twice
        layout.hide_folder(folder)
    os.replace(unfinished, folder)
    sync_folder(folder.parent)
    return folder


def _publish(save: UnfinishedSave, keep: CheckpointConfig) -> None:
    checkpoints = save.checkpoints
    if save.best:
        layout.set_link(checkpoints, layout.BEST, save.step)
    layout.set_link(checkpoints, layout.LATEST, save.step)
    sync_folder(checkpoints)
    # Later steps than this one belong to a run that was wound back: they are not ours to remove.
    folders = {step: folder for step, folder in layout.step_folders(checkpoints).items() if step <= save.step}
    for step in steps_let_go(folders, layout.linked_step(checkpoints, layout.BEST), keep):
        layout.hide_folder(folders[step])
    remove_unfinished(checkpoints)


def _try_remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        # Network file systems refuse to delete what a process still has open; the next save tries again.
        print(f"checkpoint: {folder} could not be removed ({error.strerror})", file=sys.stderr)
