"""The engines that tests hold the arithmetic against, and the tiny policy inside them."""

from typing import Any

from recap_ds.config import PiStarRECAPConfig, batch_sizes
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.plan.sizing import with_training
from tests.distributed.harness import REPOSITORY
from tests.tiny import tiny_config

# Small enough that a tiny model is sharded, prefetched and released like a large one.
SMALL = {
    "stage3_param_persistence_threshold": 600,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_max_reuse_distance": 150_000,
    "stage3_max_live_parameters": 250_000,
    "reduce_bucket_size": 70_000,
}
# Name -> (a shipped config, bf16, what is changed in its zero_optimization).
ENGINES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "zero3": ("zero3", True, SMALL),
    "zero3_fp32": ("zero3", False, SMALL),
    "zero3_hpz": ("zero3", True, {**SMALL, "zero_hpz_partition_size": 2}),
    "zero3_offload": ("zero3_offload", True, SMALL),
    "zero2": ("zero2", True, {"reduce_bucket_size": 70_000}),
}


def worker_config() -> PiStarRECAPConfig:
    """LoRA: frozen and trained parameters side by side."""
    return tiny_config(lora={"enabled": True, "rank": 4}, training={"activation_checkpointing": True, "batch_size": 2})


def resolved(name: str, config: PiStarRECAPConfig, world: int) -> dict[str, Any]:
    shipped, bf16, changes = ENGINES[name]
    ds = load_ds_config(REPOSITORY / "ds_configs" / f"{shipped}.json")
    ds["bf16"] = {"enabled": bf16}
    ds["zero_optimization"] |= changes
    config = with_training(config, use_amp=bf16)
    return resolve_ds_config(ds, config, batch_sizes(config.training, world), on_cpu=True)[0]
