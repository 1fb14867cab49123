"""The DeepSpeed JSON: checked, then completed into the dictionary the engine gets.

It owns sharding, offload, precision and communication, nothing else: batch sizes, clipping, optimizer and schedule are
ours and may only say "auto" there. DeepSpeed accepts unknown top-level keys silently, so they are refused here.
"""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from recap_ds.config import BatchSizes, PiStarRECAPConfig, TrainingConfig
from recap_ds.errors import UsageError

# Key -> what owns it.
OWNED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.*_learning_rate, betas and weight_decay",
    "scheduler": "training.num_warmup_steps and final_learning_rate_fraction",
}
SUPPORTED_KEYS = (
    *OWNED_KEYS,
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)
# Parts of zero_optimization that would break what we do with shards, and why.
REFUSED_ZERO_KEYS = {
    "zenflow": "it updates parameters outside the optimizer step",
    "zero_quantized_nontrainable_weights": "target networks are frozen parameters that are written in place",
}
# What "auto" means: (on a CPU, on an accelerator), in elements. Small on a CPU: each bucket is allocated at once.
AUTO_SIZES = {
    "reduce_bucket_size": (1_000_000, 100_000_000),
    "allgather_bucket_size": (1_000_000, 100_000_000),
    "stage3_prefetch_bucket_size": (1_000_000, 50_000_000),
    "stage3_param_persistence_threshold": (100_000, 100_000),
}
NEVER = 1_000_000_000


class Precision(NamedTuple):
    dtype: torch.dtype  # of parameters and activations; masters and Adam's state are always fp32
    text: str  # one line for the log: what was chosen and why


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read and check the JSON at ``path``; values may still be "auto"."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--deepspeed {path}: {reason}; shipped ones are in ds_configs/") from None
    try:
        ds = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except ValueError as error:
        raise UsageError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(ds, dict):
        raise UsageError(f"--deepspeed {path}: must hold a JSON object, not a {type(ds).__name__}")
    _check_top_level(ds, str(path))
    _check_zero(ds, str(path))
    return ds


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key {name!r} appears twice")
    return dict(pairs)


def _check_top_level(ds: dict[str, Any], where: str) -> None:
    for key, value in ds.items():
        if key not in SUPPORTED_KEYS:
            close = difflib.get_close_matches(key, SUPPORTED_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"supported are {', '.join(SUPPORTED_KEYS)}"
            raise UsageError(f"{where}: {key!r} is not a setting recap_ds supports; {hint}")
        if key in OWNED_KEYS and value != "auto":
            raise UsageError(f'{where}: {key!r} is set by {OWNED_KEYS[key]} in the recipe; remove it or say "auto"')
    for section in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(ds.get(section, {}), dict):
            raise UsageError(f"{where}: {section!r} must be an object")
    if ds.get("bf16", {}).get("enabled", "auto") not in ("auto", True, False):
        raise UsageError(f'{where}: bf16.enabled must be true, false or "auto"')


def _check_zero(ds: dict[str, Any], where: str) -> None:
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") not in (2, 3):
        raise UsageError(f"{where}: zero_optimization.stage must be 2 or 3, not {zero.get('stage')!r}")
    for key, reason in REFUSED_ZERO_KEYS.items():
        if zero.get(key):
            raise UsageError(f"{where}: zero_optimization.{key} is not supported: {reason}; remove it")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if not isinstance(section, dict) or section.get("device", "none") not in ("none", "cpu"):
            raise UsageError(f'{where}: zero_optimization.{key}.device must be "cpu" or "none"')
        if section.get("super_offload") or section.get("ratio", 1.0) != 1.0:
            raise UsageError(
                f"{where}: zero_optimization.{key}: super_offload and ratio need an optimizer that DeepSpeed compiles "
                "at start; remove them"
            )


def resolve_ds_config(
    ds: dict[str, Any], config: PiStarRECAPConfig, sizes: BatchSizes, on_cpu: bool
) -> tuple[dict[str, Any], Precision]:
    """The complete dictionary for ``sharded_build`` and ``build_engine``, and the precision it asks for."""
    precision = _choose_precision(ds, config.training, on_cpu)
    zero = dict(ds["zero_optimization"])
    for key, (cpu_size, accelerator_size) in AUTO_SIZES.items():
        belongs = key.startswith("stage3_") == (zero["stage"] == 3) or key == "reduce_bucket_size"
        if zero.get(key, "auto") == "auto" and belongs:
            zero[key] = cpu_size if on_cpu else accelerator_size
    _fit_secondary_shards(zero, sizes.world)
    resolved = {
        **ds,
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": config.training.max_grad_norm,  # DeepSpeed's default is 1.0, not off
        # Stage 2 looks for NaN in bf16 gradients only when asked to; stage 3 always does.
        "bf16": {**ds.get("bf16", {}), "enabled": precision.dtype == torch.bfloat16, "check_grad_overflow": True},
        "zero_optimization": zero,
        # torch's AdamW also where the state lives on the CPU: DeepSpeed's own is compiled at start.
        "zero_force_ds_cpu_optimizer": False,
        # On by default, and it waits for the device in every forward and step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "steps_per_print": NEVER,
    }
    for key in ("optimizer", "scheduler"):
        resolved.pop(key, None)
    _refuse_leftover_auto(resolved, "")
    _validate_zero(zero)
    return resolved, precision


def _choose_precision(ds: dict[str, Any], training: TrainingConfig, on_cpu: bool) -> Precision:
    asked = ds.get("bf16", {}).get("enabled", "auto")
    if asked == "auto":
        enabled = training.use_amp and not on_cpu
        if not training.use_amp:
            reason = "training.use_amp is false"
        else:
            reason = "bf16 is ten times slower on a CPU" if on_cpu else "training.use_amp is true"
    else:
        enabled, reason = asked, f"the DeepSpeed config says bf16.enabled: {json.dumps(asked)}"
        if "use_amp" in training.model_fields_set and training.use_amp != asked:
            raise UsageError(
                f"training.use_amp={json.dumps(training.use_amp)} contradicts bf16.enabled: {json.dumps(asked)} of the "
                'DeepSpeed config; change one, or let bf16.enabled say "auto"'
            )
    dtype = torch.bfloat16 if enabled else torch.float32
    return Precision(dtype, f"precision: {'bf16 with fp32 masters' if enabled else 'fp32'} ({reason})")


def _fit_secondary_shards(zero: dict[str, Any], world: int) -> None:
    """hpZ keeps a second copy of the weights within groups of ranks, a node each; a smaller job is one group."""
    size = zero.get("zero_hpz_partition_size", 1)
    if not isinstance(size, int) or size < 1 or (zero["stage"] != 3 and size > 1):
        raise UsageError(
            f"zero_optimization.zero_hpz_partition_size: {size!r} must be a whole number of ranks and needs stage 3"
        )
    if size < world and world % size:
        raise UsageError(
            f"zero_optimization.zero_hpz_partition_size: {world} ranks do not divide into groups of {size}; "
            "set it to the number of ranks on one node"
        )
    if size > 1:
        zero["zero_hpz_partition_size"] = min(size, world)


def _refuse_leftover_auto(node: dict[str, Any], path: str) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _refuse_leftover_auto(value, f"{path}{key}.")
        elif value == "auto":
            raise UsageError(f'DeepSpeed config: {path}{key}: "auto" is not known here; give a value')


def _validate_zero(zero: dict[str, Any]) -> None:
    """DeepSpeed's own check of this section, early and in one line."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UsageError(f"DeepSpeed config: {path}: {first['msg']} (got {first['input']!r})") from None
