"""Where the tensors of a checkpoint come from: our rank files, or DeepSpeed's own folder, in a run or anywhere.

Either way they are named as in the policy and read when their turn comes, a piece at a time.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import frozen_weights, read_vlm_config
from recap_ds.checkpoint.record import CheckpointRecord, open_tiles, verify_checkpoint
from recap_ds.checkpoint.tile_file import EMA, MASTER, TARGET
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.native import native_folder, open_native
from recap_ds.errors import UsageError
from recap_ds.files.records import file_problems, record_file
from recap_ds.files.tensors import TensorSource
from recap_ds.models.backbones import name_reader, vlm_prefix
from recap_ds.models.building import MetaBuilder
from recap_ds.models.export_format import Provenance, Results, WeightsName, tokenizer_files, vlm_config_json
from recap_ds.models.export_weights import folder_sources
from recap_ds.models.lora import base_name
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.vlm_weights import locate_vlm
from recap_ds.processing.contract import CONTRACT_NAME, RobotContract

Q_PREFIX, TARGET_PREFIX = "critic.q.", "target_critic."


class LocatedCheckpoint(NamedTuple):
    folder: Path  # with our files, or with DeepSpeed's
    run: Path | None  # None for a folder of DeepSpeed's whose recipe was named
    native: bool  # True = DeepSpeed's
    config_path: Path


class OpenCheckpoint(NamedTuple):
    provenance: Provenance
    tensors: dict[str, TensorSource]  # by name in the policy; a frozen VLM's layers without peft's wrapping


class Surroundings(NamedTuple):
    """What an export needs beside tensors."""

    contract: RobotContract | None  # None where a bare DeepSpeed folder's recipe has none beside it
    vlm_config: dict[str, Any]
    tokenizer_files: list[Path]
    results: Results | None


def locate_checkpoint(checkpoint: Path, config_path: Path | None = None) -> LocatedCheckpoint:
    """A run, a step folder, latest or best; or DeepSpeed's own folder (of a tag, or with its ``latest`` file).

    ``config_path``: recipe of a folder of DeepSpeed's that lies in no run.
    """
    native = native_folder(checkpoint)
    if native is None:
        if config_path is not None:
            raise UsageError(f"--config: only for a folder of DeepSpeed's own; {checkpoint} is none, leave it out")
        folder = layout.resolve_checkpoint(checkpoint)
        run = layout.run_of(folder)
        return LocatedCheckpoint(folder, run, native=False, config_path=run / layout.CONFIG_NAME)
    folder = native.resolve()
    if config_path is not None:
        return LocatedCheckpoint(folder, None, native=True, config_path=config_path)
    run = next((parent for parent in folder.parents if (parent / layout.CONFIG_NAME).is_file()), None)
    if run is None:
        raise UsageError(
            f"CHECKPOINT {checkpoint}: lies in no run folder (none above it has {layout.CONFIG_NAME}); name the recipe "
            "it was trained with by --config"
        )
    return LocatedCheckpoint(folder, run, native=True, config_path=run / layout.CONFIG_NAME)


def open_checkpoint(
    located: LocatedCheckpoint, config: PiStarRECAPConfig, weights: WeightsName | None, with_frozen: bool
) -> OpenCheckpoint:
    """``with_frozen`` False leaves out a frozen VLM and does not look for it. Reads every byte once, to verify it."""
    folder = located.folder
    if located.native:
        return _open_native(located, config, weights)
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
    provenance = Provenance(
        run=config.name,
        step=record.step,
        weights=weights,
        format="recap_ds",
        world=record.world,
        checkpoint_sha256=record_file(folder / layout.STATE_NAME).sha256,
    )
    return OpenCheckpoint(provenance, tensors)


def look_around(located: LocatedCheckpoint, config: PiStarRECAPConfig) -> Surroundings:
    if located.run is not None:
        run = located.run
        files = tokenizer_files(run / layout.BASE_NAME)
        return Surroundings(RobotContract.load(run), read_vlm_config(run), files, _results(run))
    source = locate_vlm(config.vlm_source)
    vlm_config = vlm_config_json(_shapes(config).vlm.network.config)
    beside = located.config_path.parent
    contract = RobotContract.load(beside) if (beside / CONTRACT_NAME).is_file() else None
    return Surroundings(contract, vlm_config, tokenizer_files(source) if source else [], None)


def _results(run: Path) -> Results | None:
    """None while the run has not finished."""
    path = run / layout.SUMMARY_NAME
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return Results(summary["step"], summary["evaluation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); remove it, the export only cites it") from None


def _tile_sources(folder: Path, record: CheckpointRecord, kind: str) -> dict[str, TensorSource]:
    reader = open_tiles(folder, record)
    shapes = {name: parameter.shape for name, parameter in record.parameters.items()}

    def source(kind: str, name: str) -> TensorSource:
        return TensorSource.ranges(shapes[name], torch.float32, partial(reader.read, kind, name))

    targets = {TARGET_PREFIX + name.removeprefix(Q_PREFIX): name for name in record.shadows.get(TARGET, ())}
    online = {name: source(kind, name) for name in shapes}
    return online | {target: source(TARGET, name) for target, name in targets.items()}


def _open_native(located: LocatedCheckpoint, config: PiStarRECAPConfig, weights: WeightsName | None) -> OpenCheckpoint:
    folder = located.folder
    if weights == "ema":
        raise UsageError(f"--weights ema: {folder} is DeepSpeed's own format, which holds no average; use raw")
    step_folder = next((parent for parent in folder.parents if layout.parse_step(parent.name) is not None), None)
    checkpoint_sha256 = _verify_beside_ours(folder, step_folder) if step_folder else None
    found = open_native(folder)
    tensors = {base_name(name): source for name, source in found.tensors.items()}
    if located.run is None:
        _check_fits(tensors, config, located)
    provenance = Provenance(
        run=config.name,
        step=layout.parse_step(step_folder.name) if step_folder else None,
        weights="raw",
        format="deepspeed",
        world=found.world,
        checkpoint_sha256=checkpoint_sha256,
    )
    return OpenCheckpoint(provenance, tensors)


def _verify_beside_ours(native: Path, step_folder: Path) -> str | None:
    """DeepSpeed's files against the checksums in our ``state.json``; its own hash, None where there is none."""
    state = step_folder / layout.STATE_NAME
    if not state.is_file():
        return None
    files = CheckpointRecord.load(step_folder).files
    inside = {name: record for name, record in files.items() if (step_folder / name).is_relative_to(native)}
    if problems := file_problems(step_folder, inside):
        raise UsageError(f"CHECKPOINT {step_folder}: {problems[0]}; choose another step")
    return record_file(state).sha256


def _check_fits(tensors: Mapping[str, TensorSource], config: PiStarRECAPConfig, located: LocatedCheckpoint) -> None:
    """UsageError unless the recipe describes the very model that DeepSpeed saved."""
    expected = {base_name(name): tuple(param.shape) for name, param in _shapes(config).named_parameters()}
    where = f"--config {located.config_path}: describes another model than {located.folder} holds"
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise UsageError(f"{where}: '{name}' is only in the {'recipe' if name in expected else 'checkpoint'}'s")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UsageError(f"{where}: '{name}' is {tensors[name].shape} there and {shape} by the recipe")


def _shapes(config: PiStarRECAPConfig) -> PiStarRECAPPolicy:
    builder = MetaBuilder(torch.float32)
    with builder.context():  # around all of it: adapters are added after the VLM was built
        return PiStarRECAPPolicy(config, builder)
