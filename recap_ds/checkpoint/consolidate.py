"""A checkpoint of any number of ranks -> an export. One process, no process group, no DeepSpeed.

Tensors are read from the rank files when their turn to be written comes: memory stays near the largest one.
"""

from pathlib import Path

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import read_vlm_config
from recap_ds.checkpoint.sources import locate_checkpoint, open_checkpoint
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.backbones import names_in_files, vlm_prefix
from recap_ds.models.export_format import (
    CRITICS,
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
from recap_ds.processing.contract import RobotContract
from recap_ds.recipe import load_config


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
    """Write ``checkpoint`` (a run, a step folder, latest, best, or DeepSpeed's own folder in a run) as an export.

    ``weights``: the average kept in training (ema, the default where there is one) or the last step's (raw).
    """
    out = Path(out)
    check_out(out, overwrite)
    located = locate_checkpoint(Path(checkpoint))
    run, config = located.run, load_config(located.run / layout.CONFIG_NAME)
    _check_adapter_options(config, merge_adapters, adapter_only)
    opened = open_checkpoint(located, config, weights, with_frozen=not adapter_only)
    vlm, adapter = split_adapter(_below(opened.tensors, vlm_prefix(config)))
    if merge_adapters:
        vlm, adapter = merged(vlm, adapter, config.lora), {}
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"enabled": False})})
    heads = tuple(head for head in config.heads if include_critics or head not in CRITICS)
    if not heads:
        raise UsageError("--no-critics: a run of stage critic holds nothing else; leave it out")
    contents = ExportContents(
        config=config,
        contract=RobotContract.load(run),
        provenance=Provenance(run=config.name, step=opened.step, weights=opened.weights),
        dtype=dtype,
        vlm={} if adapter_only else names_in_files(config, vlm),
        vlm_config=read_vlm_config(run),
        adapter=adapter,
        heads={} if adapter_only else {head: _below(opened.tensors, f"{head}.") for head in heads},
        adapter_is_merged=merge_adapters,
        tokenizer_files=() if adapter_only else tokenizer_files(run / layout.BASE_NAME),
    )
    return write_export(out, contents, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def _below(tensors: Sources, prefix: str) -> Sources:
    return {name.removeprefix(prefix): source for name, source in tensors.items() if name.startswith(prefix)}


def _check_adapter_options(config: PiStarRECAPConfig, merge_adapters: bool, adapter_only: bool) -> None:
    if merge_adapters and adapter_only:
        raise UsageError("--merge-adapters and --adapter-only contradict each other; give one of them")
    if (merge_adapters or adapter_only) and not config.lora.enabled:
        flag = "--merge-adapters" if merge_adapters else "--adapter-only"
        raise UsageError(f"{flag}: the run was trained without adapters (lora.enabled=false); leave it out")
