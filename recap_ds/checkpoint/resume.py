"""Find the newest checkpoint that is whole, and put an engine back to where it was saved.

A rank reads only the ranges of parameters that it owns now, so the world size, stage and sub-groups may differ from
those that wrote. At the same layout every bit comes back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.checkpoint.record import CheckpointRecord, ParameterRecord, open_tiles, verify_checkpoint
from recap_ds.checkpoint.snapshot import shadow_names, trainable_parameters
from recap_ds.distributed.engine import DeepSpeedEngine
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.tiles import (
    KEYS,
    local_tiles,
    refresh_forward_copies,
    write_adam_step,
    write_tile,
)
from recap_ds.errors import UsageError


def find_checkpoint(checkpoints: Path, runtime: Runtime, up_to_step: int | None = None) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank; rank 0 prints a line for each one it skips.

    With ``up_to_step``, of those up to that step. None where there is none at all. UsageError where there are some and
    none verifies: a run that began anew would write over them. Collective: every rank must call.
    """
    found = on_main(runtime, lambda: _newest_whole(checkpoints, up_to_step))
    return None if found is None else Path(found)


def _newest_whole(checkpoints: Path, up_to_step: int | None) -> str | None:
    reasons = []
    for step, folder in reversed(layout.step_folders(checkpoints).items()):
        if up_to_step is not None and step > up_to_step:
            continue
        problems = verify_checkpoint(folder)
        if not problems:
            return str(folder)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"checkpoint: skipped {folder.name}: {problems[0]}{more}", flush=True)
        reasons.append(f"{folder.name}: {problems[0]}")
    if reasons:
        raise UsageError(
            f"{checkpoints}: none of its checkpoints ({len(reasons)} tried) is whole, the newest is {reasons[0]}; "
            "move this folder away to start over, or restore one of them"
        )
    return None


def load_checkpoint(
    path: Path, *, runtime: Runtime, engine: DeepSpeedEngine, shadows: Mapping[str, Shadow]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Masters, Adam's state and shadows into ``engine``; returns the loop's ``state`` and ``tensors``.

    Trusts the bytes: ``find_checkpoint`` has verified them. Raises UsageError on every rank, before anything is
    changed, where the checkpoint is of another model. Collective: every rank must call.
    """
    record = on_every_rank(runtime, lambda: _matching_record(path, engine, shadows))
    on_every_rank(runtime, lambda: _read_tiles(path, record, engine, shadows))
    write_adam_step(engine, record.adam_step)
    refresh_forward_copies(engine)
    for shadow in shadows.values():
        shadow.write_targets()
    return record.state, on_every_rank(runtime, lambda: load_file(path / layout.SHARED_NAME))


def read_state(path: Path) -> dict[str, Any]:
    """The loop's ``state`` alone, without an engine."""
    return CheckpointRecord.load(path).state


def _matching_record(path: Path, engine: DeepSpeedEngine, shadows: Mapping[str, Shadow]) -> CheckpointRecord:
    record = CheckpointRecord.load(path)
    difference = _first_difference(record.parameters, trainable_parameters(engine))
    if difference:
        raise UsageError(f"{path}: {difference}; resume with the model settings of the run that wrote it")
    for kind in sorted(record.shadows.keys() ^ shadows.keys()):
        has, lacks = ("checkpoint", "run") if kind in record.shadows else ("run", "checkpoint")
        raise UsageError(f"{path}: the {has} keeps '{kind}' averages and the {lacks} does not; see training.ema_decay")
    for kind, shadow in shadows.items():
        for name in sorted(set(record.shadows[kind]) ^ set(shadow_names(shadow))):
            raise UsageError(f"{path}: the '{kind}' averages differ, first in '{name}'")
    return record


def _first_difference(stored: Mapping[str, ParameterRecord], wanted: Mapping[str, ParameterRecord]) -> str | None:
    for name in [*wanted, *stored]:
        if name not in stored:
            return f"holds nothing for parameter '{name}'"
        if name not in wanted:
            return f"holds parameter '{name}', which this model does not train"
        if stored[name] != wanted[name]:
            return f"parameter '{name}' is {_brief(stored[name])} there and {_brief(wanted[name])} here"
    return None


def _brief(parameter: ParameterRecord) -> str:
    return f"{json.dumps(parameter.shape)} in group {parameter.group}"


def _read_tiles(path: Path, record: CheckpointRecord, engine: DeepSpeedEngine, shadows: Mapping[str, Shadow]) -> None:
    """No collective in here. Empty tiles are written too: every rank must touch the same parameters."""
    reader = open_tiles(path, record)
    params = dict(engine.module.named_parameters())
    for tile in local_tiles(engine):
        for key in KEYS:
            write_tile(params[tile.name], key, reader.read(key, tile.name, tile.start, tile.length))
    for kind, shadow in shadows.items():
        for tile, _ in shadow.tiles():
            shadow.load_tile(tile.name, reader.read(kind, tile.name, tile.start, tile.length))
