"""Save tiles on one layout, load them on another; read by test_tiles.py. ``tile_worker save|load FOLDER``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from recap_ds.distributed.build import gather, param_is_sharded, sharded_build
from recap_ds.distributed.engine import destroy_engine
from recap_ds.distributed.reduce import agree, gather_flat, max_over_ranks, sum_over_ranks
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.tiles import (
    KEYS,
    local_shard,
    local_tiles,
    read_adam_step,
    read_tile,
    refresh_forward_copies,
    write_adam_step,
    write_tile,
)
from tests.distributed import tiny
from tests.distributed.harness import worker_main


def train(engine: Any, steps: range, rank: int, world: int) -> None:
    dtype = engine.module.head.weight.dtype
    for seed in steps:
        assert tiny.step(engine, tiny.rank_slice(tiny.inputs(seed, 8, dtype), rank, world))


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def masters(engine: Any) -> dict[str, np.ndarray]:
    return {name: safe_get_full_fp32_param(param).flatten().numpy() for name, param in trainable(engine).items()}


def save(engine: Any, folder: Path, rank: int) -> None:
    params = trainable(engine)
    arrays = {
        f"{tile.name}|{tile.start}|{key}": read_tile(params[tile.name], key).numpy()
        for tile in local_tiles(engine)
        for key in KEYS
    }
    np.savez(folder / f"{rank}.npz", **arrays)


def saved_tiles(folder: Path) -> Iterator[tuple[str, int, str, Tensor]]:
    for file in sorted(folder.glob("?.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            for label, values in arrays.items():
                name, start, key = label.split("|")
                yield name, int(start), key, torch.from_numpy(values)


def load(engine: Any, folder: Path, adam_step: int) -> None:
    """Any number of files into any layout: whole parameters first, small as they are here."""
    params = trainable(engine)
    # ds_numel before numel: a sharded parameter shows no elements.
    sizes = {name: p.ds_numel if param_is_sharded(p) else p.numel() for name, p in params.items()}
    whole = {(name, key): torch.full((sizes[name],), torch.nan) for name in params for key in KEYS}
    for name, start, key, values in saved_tiles(folder):
        target = whole[name, key][start : start + values.numel()]
        assert target.isnan().all(), f"two tiles overlap in {name}"
        target.copy_(values)
    for tile in local_tiles(engine):
        for key in KEYS:
            write_tile(params[tile.name], key, whole[tile.name, key][tile.start : tile.start + tile.length])
    write_adam_step(engine, adam_step)
    refresh_forward_copies(engine)


def error(engine: Any, expected: dict[str, np.ndarray]) -> float:
    actual = masters(engine)
    return max(float(np.abs(actual[name] - expected[name]).max()) for name in expected)


def resumed(ds: dict[str, Any], folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Load into an engine built from another seed, check, take the step after and compare."""
    rank, world = runtime.info.rank, runtime.info.world
    engine = tiny.build(ds, seed=1)
    fresh_step = read_adam_step(engine)
    with np.load(folder / "frozen.npz", allow_pickle=False) as frozen, torch.no_grad():
        for name, param in engine.module.named_parameters():
            if not param.requires_grad:
                with gather([param], modifier_rank=0):
                    param.copy_(torch.from_numpy(frozen[name]))
    load(engine, folder, adam_step=3)
    dtype = engine.module.head.weight.dtype
    forward_copies_follow = all(
        torch.equal(local_shard(param), read_tile(param, "fp32").to(dtype))
        for param in trainable(engine).values()
        if param_is_sharded(param)
    )
    train(engine, range(3, 4), rank, world)
    with np.load(folder / "after.npz", allow_pickle=False) as after:
        result = {
            "fresh_step": fresh_step,
            "step": read_adam_step(engine),
            "forward_copies_follow": forward_copies_follow,
            "error": error(engine, dict(after)),
            "moments_moved": moments_moved(engine),
        }
    destroy_engine(engine)
    return result


def moments_moved(engine: Any) -> bool:
    params = trainable(engine)
    tiles = [tile for tile in local_tiles(engine) if tile.length]
    return all(bool(read_tile(params[tile.name], key).any()) for tile in tiles for key in ("exp_avg", "exp_avg_sq"))


def moments_after_training(ds: dict[str, Any]) -> bool:
    """Of an engine that was stepped but never loaded into."""
    engine = tiny.build(ds)
    train(engine, range(1), 0, 1)
    moved = moments_moved(engine) and read_adam_step(engine) == 1
    destroy_engine(engine)
    return moved


def save_scenarios(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Three steps, tiles, a fourth step to compare with; then the same layouts again."""
    rank, world = runtime.info.rank, runtime.info.world
    engine = tiny.build(tiny.ds_config("zero3", world))
    if rank == 0:
        folder.mkdir()
    with gather(engine.module.parameters()):
        frozen = {n: p.detach().clone().numpy() for n, p in engine.module.named_parameters() if not p.requires_grad}
    train(engine, range(3), rank, world)
    runtime.barrier()
    save(engine, folder, rank)
    saved_step = read_adam_step(engine)
    train(engine, range(3, 4), rank, world)
    after = masters(engine)
    if rank == 0:
        np.savez(folder / "frozen.npz", **frozen)
        np.savez(folder / "after.npz", **after)
    spans = [[tile.name, tile.start, tile.length, tile.group] for tile in local_tiles(engine)]
    destroy_engine(engine)
    runtime.barrier()
    return {
        "saved_step": saved_step,
        "tiles": spans,
        "sizes": {name: len(values) for name, values in after.items()},
        "resumed": {
            "zero3": resumed(tiny.ds_config("zero3", world), folder, runtime),
            "zero2": resumed(tiny.ds_config("zero2", world), folder, runtime),
            "offload": resumed(tiny.ds_config("zero3_offload", world), folder, runtime),
        },
        "reductions": reductions(runtime),
        "build": build_values(runtime, "zero3", {}) | {"hpz": build_values(runtime, "zero3_hpz", {"size": 2})},
    }


def load_scenarios(runtime: Runtime, folder: Path) -> dict[str, Any]:
    configs = {
        "zero3": tiny.ds_config("zero3", 1),
        "zero3 other sub-groups": tiny.ds_config("zero3", 1, sub_group_size=40),
        "zero2": tiny.ds_config("zero2", 1),
        "offload": tiny.ds_config("zero3_offload", 1),
        "zero2 offload": tiny.ds_config("zero2", 1, offload_optimizer={"device": "cpu"}),
        "zero3 bf16": tiny.ds_config("zero3", 1, bf16=True),
    }
    return {
        "moments_after_training": {name: moments_after_training(ds) for name, ds in configs.items()},
        "resumed": {name: resumed(ds, folder, runtime) for name, ds in configs.items()},
        "reductions": reductions(runtime),
    }


def reductions(runtime: Runtime) -> dict[str, Any]:
    rank = runtime.info.rank
    mine = torch.tensor([float(rank), 10.0 - rank])
    return {
        "sum": sum_over_ranks(mine).tolist(),
        "max": max_over_ranks(mine).tolist(),
        "mine_unwritten": mine.tolist() == [float(rank), 10.0 - rank],
        "gathered": gather_flat(mine).tolist(),
        "gathered_bools": gather_flat(torch.tensor([rank == 0, True])).tolist(),
        "agreed": agree(rank == 0, runtime.device),
        "object": runtime.broadcast_object({"step": 7, "names": ["a", "b"], "rank": rank}),
    }


def build_values(runtime: Runtime, name: str, hpz: dict[str, int]) -> dict[str, Any]:
    """Is a transformers model built inside the context sharded, and does it start from plain torch's values?"""
    zero = {"zero_hpz_partition_size": hpz["size"]} if hpz else {}
    ds = tiny.ds_config(name, runtime.info.world, **zero)
    config = transformers.GemmaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    torch.manual_seed(5)
    with sharded_build(ds):
        model = transformers.GemmaModel._from_config(config)
        linear = torch.nn.Linear(4, 4)
    sharded = all(param_is_sharded(param) for param in [*model.parameters(), *linear.parameters()])
    with gather(model.parameters()):
        spread = model.layers[0].mlp.up_proj.weight.std().item()
    return {"sharded": sharded, "initialised": 0.5 * config.initializer_range < spread < 2 * config.initializer_range}


def scenarios(runtime: Runtime, mode: str, folder: str) -> dict[str, Any]:
    return {"save": save_scenarios, "load": load_scenarios}[mode](runtime, Path(folder))


if __name__ == "__main__":
    worker_main(scenarios)
