"""Scenarios about running averages, on two ranks; read by test_shadows.py."""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.nn import Parameter

from recap_ds.distributed.build import gather
from recap_ds.distributed.engine import destroy_engine
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.tiles import local_shard, read_tile
from tests.distributed import tiny
from tests.distributed.harness import worker_main

RATE = 0.05


def critics(engine: Any) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    module = engine.module
    return dict(module.critic.named_parameters()), dict(module.target_critic.named_parameters())


def polyak(ds: dict[str, Any], rank: int, world: int, num_steps: int) -> dict[str, Any]:
    """``num_steps`` of training, the target lerped after each, beside a dense fp32 average of the gathered masters."""
    engine = tiny.build(ds)
    online, targets = critics(engine)
    shadow = Shadow(online, targets)
    dense = {name: safe_get_full_fp32_param(param).clone() for name, param in online.items()}
    starts_equal = all(torch.equal(local_shard(targets[name]), local_shard(online[name])) for name in online)
    dtype = engine.module.head.weight.dtype
    for seed in range(num_steps):
        tiny.step(engine, tiny.rank_slice(tiny.inputs(seed, 8, dtype), rank, world))
        shadow.lerp(RATE)
        for name, param in online.items():
            dense[name].lerp_(safe_get_full_fp32_param(param), RATE)
    differences = [
        values - dense[tile.name].flatten()[tile.start : tile.start + tile.length] for tile, values in shadow.tiles()
    ]
    result = {
        "starts_equal": starts_equal,
        "error": torch.cat(differences).abs().max().item(),
        "moved": max((dense[name] - safe_get_full_fp32_param(online[name])).abs().max().item() for name in online),
        "forward_uses_the_average": forward_uses(engine, dense),
        "num_tile_elements": sum(tile.length for tile, _ in shadow.tiles()),
    }
    destroy_engine(engine)
    return result


def forward_uses(engine: Any, dense: dict[str, Tensor]) -> float:
    """How far the engine's forward is from one with the dense average, rounded once, in the target's place."""
    module = engine.module
    batch = tiny.inputs(77, 4, module.head.weight.dtype)
    with torch.no_grad():
        seen = engine(batch).loss.item()
        plain = tiny.Container().to(module.head.weight.dtype)
        with gather(module.parameters()):
            for mine, theirs in zip(plain.parameters(), module.parameters(), strict=True):
                mine.copy_(theirs)
        for name, param in plain.target_critic.named_parameters():
            param.copy_(dense[name])
        return abs(seen - plain(batch).loss.item())


def trained(ds: dict[str, Any], rank: int, world: int, swap: bool) -> dict[str, Any]:
    """Five steps, with or without a look through the average's eyes between them."""
    engine = tiny.build(ds)
    online = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    shadow = Shadow(online)
    dtype = engine.module.head.weight.dtype
    probe = tiny.inputs(99, 4, dtype)
    identical, differs = True, False
    for seed in range(5):
        tiny.step(engine, tiny.rank_slice(tiny.inputs(seed, 8, dtype), rank, world))
        shadow.lerp(RATE)
        if swap:
            before = {name: local_shard(param).clone() for name, param in online.items()}
            with torch.no_grad():
                own = engine(probe).loss.item()
                with shadow.swapped_into_online():
                    differs |= engine(probe).loss.item() != own
                identical &= engine(probe).loss.item() == own
            identical &= all(torch.equal(before[name], local_shard(param)) for name, param in online.items())
    final = [value for param in online.values() for value in read_tile(param, "fp32").tolist()]
    destroy_engine(engine)
    return {"final": final, "identical": identical, "differs": differs}


def scenarios(runtime: Runtime) -> dict[str, Any]:
    rank, world = runtime.info.rank, runtime.info.world
    configs = {
        "zero3": tiny.ds_config("zero3", world),
        "zero3 not persistent": tiny.ds_config("zero3", world, stage3_param_persistence_threshold=0),
        "zero3 bf16": tiny.ds_config("zero3", world, bf16=True),
        "offload": tiny.ds_config("zero3_offload", world),
        "zero2": tiny.ds_config("zero2", world),
        "zero2 bf16": tiny.ds_config("zero2", world, bf16=True),
        # Last: DeepSpeed keeps hpZ's process group for the rest of the process.
        "hpz": tiny.ds_config("zero3_hpz", world, zero_hpz_partition_size=2),
        "hpz bf16": tiny.ds_config("zero3_hpz", world, bf16=True, zero_hpz_partition_size=2),
        "hpz not persistent": tiny.ds_config(
            "zero3_hpz", world, zero_hpz_partition_size=2, stage3_param_persistence_threshold=0
        ),
    }
    result: dict[str, Any] = {"polyak": {}, "swap": {}}
    for name, ds in configs.items():
        long = name in ("zero3", "zero3 not persistent", "hpz bf16")
        result["polyak"][name] = polyak(ds, rank, world, num_steps=200 if long else 20)
        plain, swapped = trained(ds, rank, world, swap=False), trained(ds, rank, world, swap=True)
        result["swap"][name] = {
            "trace_untouched": plain["final"] == swapped["final"],
            "identical": swapped["identical"],
            "differs": swapped["differs"],
        }
    return result


if __name__ == "__main__":
    worker_main(scenarios)
