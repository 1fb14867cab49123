"""Write a checkpoint: under an unfinished name, on all ranks, then one rename; never half of one under its own name.

Every rank writes its tiles and flushes them. Only when all have succeeded does rank 0 write ``state.json`` (with every
file's size and checksum), rename the folder, move ``latest``, and remove what retention no longer keeps. A failure
before the rename, on any rank, leaves everything as it was, removes what was written so far (the disk may be full) and
raises the same error on every rank.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from recap_ds import __version__
from recap_ds.checkpoint import layout
from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.checkpoint.record import CheckpointRecord, GroupSettings, ParameterRecord
from recap_ds.checkpoint.tile_file import StoredTile, write_tile_file
from recap_ds.config import CheckpointConfig
from recap_ds.distributed.build import param_is_sharded
from recap_ds.distributed.engine import DeepSpeedEngine, save_native, zero_stage
from recap_ds.distributed.reduce import gather_flat
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.tiles import KEYS, local_tiles, read_adam_step, read_tile
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import FileRecord, record_files
from recap_ds.files.tensors import TensorSource, write_tensor_file


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

    ``checkpoints`` lies on a file system that all ranks share.

    Only between optimizer steps. Raises RunFailed on every rank where a disk or a folder fails.
    Collective: every rank must call.
    """
    unfinished = checkpoints / layout.unfinished_name(step)

    def finish() -> str:
        _check_shared(unfinished, files)
        sources = {name: TensorSource.of(tensor) for name, tensor in tensors.items()}
        files[layout.SHARED_NAME] = write_tensor_file(unfinished / layout.SHARED_NAME, sources)
        files.update(_record_native(unfinished))
        record = _describe(engine, shadows, step, adam_step, runtime.info.world, files, dict(state))
        record.save(unfinished)
        return str(_commit(unfinished, checkpoints / layout.step_name(step)))

    with _leaving_nothing_unfinished(unfinished, step, runtime):
        on_main(runtime, lambda: _start(checkpoints, unfinished))
        adam_step = read_adam_step(engine)
        path = unfinished / layout.rank_file_name(runtime.info.rank)
        mine = on_every_rank(runtime, lambda: write_tile_file(path, _stored_tiles(engine, shadows)))
        records = _gather_records(mine, runtime.device)
        files = {layout.rank_file_name(rank): record for rank, record in enumerate(records)}
        if keep.also_deepspeed:
            save_native(engine, unfinished / layout.NATIVE_NAME)
        runtime.barrier()
        folder = Path(on_main(runtime, finish))
        # From here on the checkpoint exists, whatever happens to links and old ones.
        on_main(runtime, lambda: _publish(checkpoints, step, keep, best))
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
        if runtime.info.is_main and unfinished.exists():
            _try_remove(unfinished)
        if isinstance(error, UsageError):
            raise
        raise RunFailed(
            f"{unfinished.parent}: saving step {step} failed ({error}); free space there or make the folder writable, "
            "then start the run again: it goes on from its newest checkpoint"
        ) from error


def _start(checkpoints: Path, unfinished: Path) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoints)
    unfinished.mkdir()


def _stored_tiles(engine: DeepSpeedEngine, shadows: Mapping[str, Shadow]) -> Iterator[StoredTile]:
    """What this rank owns; a small parameter may lie in other ranks' parts altogether."""
    params = dict(engine.module.named_parameters())
    for tile in local_tiles(engine):
        for key in KEYS if tile.length else ():
            yield StoredTile(key, tile.name, tile.start, read_tile(params[tile.name], key))
    for kind, shadow in shadows.items():
        for tile, values in shadow.tiles():
            if tile.length:
                yield StoredTile(kind, tile.name, tile.start, values)


def _gather_records(mine: FileRecord, device: torch.device) -> list[FileRecord]:
    """Every rank's record, in rank order. Collective: every rank must call."""
    row = mine.bytes.to_bytes(8, "little") + bytes.fromhex(mine.sha256)
    gathered = gather_flat(torch.tensor(list(row), dtype=torch.uint8, device=device))
    rows = [bytes(values) for values in gathered.view(-1, len(row)).tolist()]
    return [FileRecord(int.from_bytes(row[:8], "little"), row[8:].hex()) for row in rows]


def _check_shared(unfinished: Path, files: Mapping[str, FileRecord]) -> None:
    for name, record in files.items():
        path = unfinished / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise UsageError(
                f"runs_dir: rank 0 does not see {path} as another rank wrote it; name a folder on a file system that "
                "all nodes share"
            )


def _record_native(unfinished: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in (unfinished / layout.NATIVE_NAME).rglob("*") if path.is_file())
    records = record_files(paths)
    return {str(path.relative_to(unfinished)): record for path, record in zip(paths, records, strict=True)}


def _describe(
    engine: DeepSpeedEngine,
    shadows: Mapping[str, Shadow],
    step: int,
    adam_step: int,
    world: int,
    files: dict[str, FileRecord],
    state: dict[str, Any],
) -> CheckpointRecord:
    settings = [
        GroupSettings(name=group["name"], lr=group["lr"], weight_decay=group["weight_decay"])
        for group in engine.optimizer.param_groups
    ]
    return CheckpointRecord(
        recap_ds_version=__version__,
        step=step,
        adam_step=adam_step,
        world=world,
        zero_stage=zero_stage(engine),
        precision=str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        groups=tuple(settings),
        parameters=trainable_parameters(engine),
        shadows={kind: shadow_names(shadow) for kind, shadow in shadows.items()},
        files=files,
        state=state,
    )


def trainable_parameters(engine: DeepSpeedEngine) -> dict[str, ParameterRecord]:
    """Name -> whole shape and optimizer group, in the model's order."""
    params = dict(engine.module.named_parameters())
    return {
        tile.name: ParameterRecord(shape=_whole_shape(params[tile.name]), group=tile.group)
        for tile in local_tiles(engine)
    }


def shadow_names(shadow: Shadow) -> tuple[str, ...]:
    return tuple(tile.name for tile, _ in shadow.tiles())


def _whole_shape(param: Parameter) -> tuple[int, ...]:
    return tuple(param.ds_shape if param_is_sharded(param) else param.shape)


def _commit(unfinished: Path, folder: Path) -> Path:
    sync_folder(unfinished)
    if folder.exists():  # a damaged one that resume passed over, or the same step saved twice
        layout.hide_folder(folder)
    os.replace(unfinished, folder)
    sync_folder(folder.parent)
    return folder


def _publish(checkpoints: Path, step: int, keep: CheckpointConfig, best: bool) -> None:
    if best:
        layout.set_link(checkpoints, layout.BEST, step)
    layout.set_link(checkpoints, layout.LATEST, step)
    sync_folder(checkpoints)
    for old in _no_longer_kept(checkpoints, step, keep):
        layout.hide_folder(old)
    remove_unfinished(checkpoints)


def _try_remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # Network file systems refuse to delete what a process still has open; the next save tries again.
        print(f"checkpoint: {folder} could not be removed ({error.strerror})", file=sys.stderr)


def _no_longer_kept(checkpoints: Path, step: int, keep: CheckpointConfig) -> list[Path]:
    """What retention lets go. Later steps than this one belong to a run that was wound back: they are not ours."""
    folders = {saved: path for saved, path in layout.step_folders(checkpoints).items() if saved <= step}
    kept = set(sorted(folders)[-keep.keep_last :]) | {layout.linked_step(checkpoints, layout.BEST)}
    if keep.keep_every_steps:
        kept |= {saved for saved in folders if saved % keep.keep_every_steps == 0}
    return [path for saved, path in folders.items() if saved not in kept]
