"""Where the tensors of a checkpoint come from: our rank files, or DeepSpeed's own folder beside or without them.

Either way they are named as in the policy and read when their turn comes.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import frozen_weights
from recap_ds.checkpoint.record import CheckpointRecord, open_tiles, verify_checkpoint
from recap_ds.checkpoint.tile_file import EMA, MASTER, TARGET
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.native import is_native, open_native
from recap_ds.errors import UsageError
from recap_ds.files.tensors import TensorSource
from recap_ds.models.backbones import name_reader, vlm_prefix
from recap_ds.models.export_format import WeightsName
from recap_ds.models.export_weights import folder_sources
from recap_ds.models.lora import base_name

Q_PREFIX, TARGET_PREFIX = "critic.q.", "target_critic."


class LocatedCheckpoint(NamedTuple):
    folder: Path  # with our files, or with DeepSpeed's
    run: Path
    native: bool  # True = DeepSpeed's


class OpenCheckpoint(NamedTuple):
    step: int | None  # None where a DeepSpeed folder does not say
    weights: WeightsName
    tensors: dict[str, TensorSource]  # by name in the policy; a frozen VLM's layers without peft's wrapping


def locate_checkpoint(checkpoint: Path) -> LocatedCheckpoint:
    """A run, a step folder, latest or best; or the folder, somewhere in a run, in which DeepSpeed's files lie."""
    if not is_native(checkpoint):
        folder = layout.resolve_checkpoint(checkpoint)
        return LocatedCheckpoint(folder, layout.run_of(folder), native=False)
    folder = checkpoint.resolve()
    run = next((parent for parent in folder.parents if (parent / layout.CONFIG_NAME).is_file()), None)
    if run is None:
        raise UsageError(f"CHECKPOINT {checkpoint}: lies in no run folder (none above it has {layout.CONFIG_NAME})")
    return LocatedCheckpoint(folder, run, native=True)


def open_checkpoint(
    located: LocatedCheckpoint, config: PiStarRECAPConfig, weights: WeightsName | None, with_frozen: bool
) -> OpenCheckpoint:
    """``with_frozen`` False leaves out a frozen VLM and does not look for it. Reads every byte once, to verify it."""
    folder = located.folder
    if located.native:
        return _open_native(folder, weights)
    if problems := verify_checkpoint(folder):
        raise UsageError(f"CHECKPOINT {folder}: {problems[0]}; choose another step")
    record = CheckpointRecord.load(folder)
    weights = weights or ("ema" if EMA in record.shadows else "raw")
    if weights == "ema" and EMA not in record.shadows:
        raise UsageError(f"--weights ema: {folder} holds no average (training.ema_decay was null); use raw")
    tensors = _tile_sources(folder, record, EMA if weights == "ema" else MASTER)
    if with_frozen and (frozen := frozen_weights(located.run, config.vlm_source)):
        stored = folder_sources(frozen, name_reader(config, frozen))
        tensors |= {vlm_prefix(config) + name: source for name, source in stored.items()}
    return OpenCheckpoint(record.step, weights, tensors)


def _tile_sources(folder: Path, record: CheckpointRecord, kind: str) -> dict[str, TensorSource]:
    reader = open_tiles(folder, record)
    shapes = {name: parameter.shape for name, parameter in record.parameters.items()}

    def source(kind: str, name: str) -> TensorSource:
        return TensorSource(shapes[name], torch.float32, lambda: reader.read_whole(kind, name, shapes[name]))

    targets = {TARGET_PREFIX + name.removeprefix(Q_PREFIX): name for name in record.shadows.get(TARGET, ())}
    online = {name: source(kind, name) for name in shapes}
    return online | {target: source(TARGET, name) for target, name in targets.items()}


def _open_native(folder: Path, weights: WeightsName | None) -> OpenCheckpoint:
    if weights == "ema":
        raise UsageError(f"--weights ema: {folder} is DeepSpeed's own format, which holds no average; use raw")
    steps = [step for parent in folder.parents if (step := layout.parse_step(parent.name)) is not None]
    tensors = {
        base_name(name): TensorSource(tensor.shape, torch.float32, tensor.read)
        for name, tensor in open_native(folder).items()
    }
    return OpenCheckpoint(steps[0] if steps else None, "raw", tensors)
