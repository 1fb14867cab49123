"""A checkpoint of any number of ranks -> an export. One process, no process group, no DeepSpeed.

Tensors are read from the rank files a piece at a time when their turn to be written comes; merging an adapter holds one
matrix.
"""

from pathlib import Path

from recap_ds.checkpoint.sources import locate_checkpoint, look_around, open_checkpoint
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.backbones import names_in_files, vlm_prefix
from recap_ds.models.export_format import (
    CRITICS,
    DEFAULT_MAX_SHARD_BYTES,
    DtypeName,
    ExportContents,
    ExportRecord,
    Sources,
    WeightsName,
    merged,
    split_adapter,
)
from recap_ds.models.export_write import check_out, write_export
from recap_ds.recipe import load_config


def consolidate(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    weights: WeightsName | None = None,
    dtype: DtypeName = "float32",
    merge: bool = False,
    adapter_only: bool = False,
    policy_only: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> ExportRecord:
    """Write ``checkpoint`` (a run, a step folder, latest, best, or DeepSpeed's own folder) as an export.

    ``weights``: the average kept in training (ema, the default where there is one) or the last step's (raw).
    ``config``: the recipe, for a folder of DeepSpeed's that lies in no run.
    """
    out = Path(out)
    check_out(out, overwrite)
    located = locate_checkpoint(Path(checkpoint), Path(config) if config is not None else None)
    recipe = load_config(located.config_path)
    _check_options(recipe, merge, adapter_only, policy_only)
    opened = open_checkpoint(located, recipe, weights, with_frozen=not adapter_only)
    around = look_around(located, recipe)
    vlm, adapter = split_adapter(_below(opened.tensors, vlm_prefix(recipe)))
    if merge:
        vlm, adapter = merged(vlm, adapter, recipe.lora), {}
        recipe = merged_recipe(recipe)
    heads = [head for head in recipe.heads if not (adapter_only or (policy_only and head in CRITICS))]
    contents = ExportContents(
        config=recipe,
        contract=around.contract,
        provenance=opened.provenance,
        dtype=dtype,
        vlm={} if adapter_only else names_in_files(recipe, vlm),
        vlm_config=around.vlm_config,
        adapter=adapter,
        heads={head: _below(opened.tensors, f"{head}.") for head in heads},
        adapter_is_merged=merge,
        tokenizer_files=() if adapter_only else around.tokenizer_files,
        results=around.results,
    )
    return write_export(out, contents, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def merged_recipe(recipe: PiStarRECAPConfig) -> PiStarRECAPConfig:
    """Of a policy whose adapters are part of its weights, with no loss left that only adapters would learn by."""
    lora = recipe.lora.model_copy(update={"enabled": False})
    model = recipe.model.model_copy(update={"action_token_weight": 0.0})
    return recipe.model_copy(update={"lora": lora, "model": model})


def _below(tensors: Sources, prefix: str) -> Sources:
    return {name.removeprefix(prefix): source for name, source in tensors.items() if name.startswith(prefix)}


def _check_options(config: PiStarRECAPConfig, merge: bool, adapter_only: bool, policy_only: bool) -> None:
    if merge and adapter_only:
        raise UsageError("--merge and --adapter-only contradict each other; give one of them")
    if (merge or adapter_only) and not config.lora.enabled:
        flag = "--merge" if merge else "--adapter-only"
        raise UsageError(f"{flag}: the run was trained without adapters (lora.enabled=false); leave it out")
    if policy_only and "action_expert" not in config.heads:
        raise UsageError("--policy-only: a run of stage critic holds no policy; leave it out")
