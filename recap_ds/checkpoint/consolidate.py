"""A checkpoint of any number of ranks -> an export. One process, no process group, no DeepSpeed.

Tensors are read from the rank files when their turn to be written comes: memory stays near the largest one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import frozen_weights, read_vlm_config
from recap_ds.checkpoint.record import CheckpointRecord, open_tiles, verify_checkpoint
from recap_ds.checkpoint.tile_file import EMA, MASTER, TARGET, TileReader
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.export_format import (
    DEFAULT_MAX_SHARD_BYTES,
    DtypeName,
    ExportContents,
    ExportRecord,
    Provenance,
    Sources,
    WeightsName,
    check_out,
    merged,
    split_adapter,
    tokenizer_files,
    write_export,
)
from recap_ds.models.export_weights import folder_sources
from recap_ds.models.tensor_file import TensorSource
from recap_ds.processing.contract import RobotContract
from recap_ds.recipe import load_config

VLM_PREFIX = "vlm.paligemma."
Q_PREFIX = "critic.q."  # its slow twin is target_critic


def consolidate(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: WeightsName | None = None,
    dtype: DtypeName = "float32",
    merge_adapters: bool = False,
    adapter_only: bool = False,
    include_critics: bool = True,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> ExportRecord:
    """Write ``checkpoint`` (a run, a step folder, latest or best) as an export.

    ``weights``: the average kept in training (ema, the default where there is one) or the last step's (raw).
    """
    folder, out = layout.resolve_checkpoint(checkpoint), Path(out)
    check_out(out, overwrite)
    run = layout.run_of(folder)
    config = load_config(run / layout.CONFIG_NAME)
    _check_adapter_options(config, merge_adapters, adapter_only)
    if problems := verify_checkpoint(folder):
        raise UsageError(f"CHECKPOINT {folder}: {problems[0]}; choose another step")
    record = CheckpointRecord.load(folder)
    weights = weights or ("ema" if EMA in record.shadows else "raw")
    if weights == "ema" and EMA not in record.shadows:
        raise UsageError(f"--weights ema: {folder} holds no average (training.ema_decay was null); use raw")
    parts = _parts(record, open_tiles(folder, record), EMA if weights == "ema" else MASTER)
    vlm, adapter = split_adapter(parts["vlm"])
    if config.model.freeze_vlm and not adapter_only:
        vlm = folder_sources(frozen_weights(run, config.model))
    if merge_adapters:
        vlm, adapter = merged(vlm, adapter, config.lora), {}
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"enabled": False})})
    heads = ("action_expert", *(("critic", "target_critic") if include_critics else ()))
    contents = ExportContents(
        config=config,
        contract=RobotContract.load(run),
        provenance=Provenance(run=config.name, step=record.step, weights=weights),
        dtype=dtype,
        vlm={} if adapter_only else vlm,
        vlm_config=read_vlm_config(run),
        adapter=adapter,
        heads={} if adapter_only else {head: parts[head] for head in heads},
        adapter_is_merged=merge_adapters,
        tokenizer_files=() if adapter_only else tokenizer_files(run / layout.BASE_NAME),
    )
    return write_export(out, contents, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def _check_adapter_options(config: PiStarRECAPConfig, merge_adapters: bool, adapter_only: bool) -> None:
    if merge_adapters and adapter_only:
        raise UsageError("--merge-adapters and --adapter-only contradict each other; give one of them")
    if (merge_adapters or adapter_only) and not config.lora.enabled:
        flag = "--merge-adapters" if merge_adapters else "--adapter-only"
        raise UsageError(f"{flag}: the run was trained without adapters (lora.enabled=false); leave it out")


def _parts(record: CheckpointRecord, reader: TileReader, kind: str) -> Mapping[str, Sources]:
    """Module -> tensors under their names inside it, of everything the checkpoint holds."""
    shapes = {name: parameter.shape for name, parameter in record.parameters.items()}
    parts: dict[str, dict[str, TensorSource]] = {"vlm": {}, "action_expert": {}, "critic": {}, "target_critic": {}}
    for name in record.parameters:
        part, inner = name.split(".", 1)
        parts[part][inner] = _source(reader, kind, name, shapes[name])
    parts["vlm"] = {f"vlm.{name}".removeprefix(VLM_PREFIX): source for name, source in parts["vlm"].items()}
    for name in record.shadows[TARGET]:
        parts["target_critic"][name.removeprefix(Q_PREFIX)] = _source(reader, TARGET, name, shapes[name])
    return parts


def _source(reader: TileReader, kind: str, name: str, shape: tuple[int, ...]) -> TensorSource:
    return TensorSource(shape, torch.float32, lambda: reader.read_whole(kind, name, shape))
