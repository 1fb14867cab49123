"""Scenarios about DeepSpeed itself, on two ranks; read by test_canaries.py."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import safe_get_full_grad, safe_get_local_fp32_param
from torch import Tensor, nn

from recap_ds.distributed.build import gather, param_is_sharded, sharded_build
from recap_ds.distributed.engine import (
    build_engine,
    destroy_engine,
    global_grad_norm,
    grad_norms_by_group,
    step_was_applied,
    zero_stale_gradients,
)
from recap_ds.distributed.linear import sharded_linear
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.tiles import local_shard, read_tile, write_local_shard
from tests.distributed import tiny
from tests.distributed.harness import worker_main


class Branches(nn.Module):
    """Two branches of which a step uses one: what a container must never be."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 1)

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return (self.a if branch == "a" else self.b)(x).square().mean()


def build_branches(ds: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with sharded_build(ds):
        model = Branches()
    group = {"name": "all", "params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}
    return build_engine(model, [group], ds)


def branch_step(engine: Any, x: Tensor, branch: str) -> None:
    engine.backward(engine(x, branch))
    engine.step()


def stale_gradients(ds: dict[str, Any], cure: bool) -> dict[str, Any]:
    """Norms and parameters of step "b" after a step "a", and whether a NaN in "a" outlives its step."""
    engine = build_branches(ds)
    x = torch.linspace(-1, 1, 32).view(4, 8)
    branch_step(engine, x, "a")
    if cure:
        zero_stale_gradients(engine)
    with gather(engine.module.parameters()):
        reference = copy.deepcopy([(p.data.clone()) for p in engine.module.b.parameters()])
    weight, bias = (p.requires_grad_() for p in reference)
    torch.nn.functional.linear(x, weight, bias).square().mean().backward()
    branch_step(engine, x, "b")
    norm = global_grad_norm(engine).item()
    if cure:
        zero_stale_gradients(engine)
    branch_step(engine, x * float("nan"), "a")
    nan_applied = step_was_applied(engine)
    if cure:
        zero_stale_gradients(engine)
    branch_step(engine, x, "b")
    result = {
        "norm": norm,
        "norm_of_b": torch.stack([weight.grad.norm(), bias.grad.norm()]).norm().item(),
        "nan_step_applied": nan_applied,
        "step_after_nan_applied": step_was_applied(engine),
    }
    destroy_engine(engine)
    return result


def two_forwards_two_backwards(ds: dict[str, Any]) -> dict[str, float]:
    engine = build_branches(ds)
    x = torch.linspace(-1, 1, 32).view(4, 8)
    first, second = engine(x, "a"), engine(2 * x, "a")
    engine.backward(first)
    engine.backward(second)
    engine.step()
    both = global_grad_norm(engine).item()
    destroy_engine(engine)
    engine = build_branches(ds)
    branch_step(engine, 2 * x, "a")
    only_second = global_grad_norm(engine).item()
    destroy_engine(engine)
    return {"norm": both, "norm_of_second": only_second}


def persistent_write(ds: dict[str, Any]) -> dict[str, bool]:
    """Is a new shard of a small frozen parameter seen by the next forward?"""
    engine = tiny.build(ds)
    batch = tiny.inputs(0, 4)
    tiny.step(engine, batch)
    frozen = engine.module.target_critic.bias
    with torch.no_grad():
        before = engine(batch).loss.item()
        local_shard(frozen).fill_(3.0)
        plain = engine(batch).loss.item()
        write_local_shard(frozen, torch.full_like(local_shard(frozen), 5.0))
        ours = engine(batch).loss.item()
    destroy_engine(engine)
    return {"plain_write_seen": plain != before, "our_write_seen": ours not in (before, plain)}


def misspelt_key_accepted(ds: dict[str, Any]) -> bool:
    try:
        DeepSpeedConfig({**ds, "gradient_cliping": 1.0})
    except DeepSpeedConfigError:
        return False
    return True


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(1000, dtype=torch.float32))


def buffer_downcast(ds: dict[str, Any]) -> dict[str, Any]:
    with sharded_build(ds):
        model = Tables()
    return {"dtype": str(model.table.dtype), "last": model.table[-1].item(), "sharded": param_is_sharded(model.weight)}


def nan_on_one_rank(ds: dict[str, Any], rank: int) -> dict[str, Any]:
    engine = tiny.build(ds)
    before = read_tile(engine.module.head.weight, "fp32").clone()
    batch = tiny.inputs(0, 4, engine.module.head.weight.dtype)
    poisoned = batch._replace(target=batch.target * float("nan")) if rank == 1 else batch
    applied = tiny.step(engine, poisoned)
    unchanged = torch.equal(before, read_tile(engine.module.head.weight, "fp32"))
    result = {"applied": applied, "unchanged": unchanged, "next_applied": tiny.step(engine, batch)}
    destroy_engine(engine)
    return result


def container_gradients(ds: dict[str, Any], runtime: Runtime, checkpointing: bool) -> dict[str, Any]:
    """Largest difference to plain autograd over the whole batch, after two steps that record ZeRO-3's trace."""
    engine = tiny.build(ds)
    world, rank = runtime.info.world, runtime.info.rank
    accumulation = engine.gradient_accumulation_steps()
    for seed in range(2 * accumulation):
        tiny.step(engine, tiny.rank_slice(tiny.inputs(seed, 8), rank, world), checkpointing=checkpointing)
    plain = tiny.Container()
    with gather(engine.module.parameters()), torch.no_grad():
        for mine, theirs in zip(plain.parameters(), engine.module.parameters(), strict=True):
            mine.copy_(theirs)
    batches = [tiny.inputs(9 + index, 8) for index in range(accumulation)]
    (sum(plain(batch).loss for batch in batches) / accumulation).backward()
    for batch in batches[:-1]:
        tiny.step(engine, tiny.rank_slice(batch, rank, world), checkpointing=checkpointing)
    engine.backward(engine(tiny.rank_slice(batches[-1], rank, world), checkpointing=checkpointing).loss)
    differences = [
        (mine.grad - safe_get_full_grad(theirs)).abs().max().item()
        for mine, theirs in zip(plain.parameters(), engine.module.parameters(), strict=True)
        if mine.requires_grad
    ]
    groups = [[*plain.trunk.adapter.parameters(), *plain.head.parameters()], list(plain.critic.parameters())]
    expected = torch.stack([torch.stack([p.grad.norm() for p in group]).norm() for group in groups])
    norms = grad_norms_by_group(engine)
    engine.step()
    result = {
        "largest_difference": max(differences),
        "group_norm_error": (norms - expected).abs().max().item(),
        "global_norm_error": abs(global_grad_norm(engine).item() - expected.norm().item()),
        "masters_match_safe_api": _masters_match(engine) if param_is_sharded(engine.module.head.weight) else True,
    }
    destroy_engine(engine)
    return result


def _masters_match(engine: Any) -> bool:
    trainable = [param for param in engine.module.parameters() if param.requires_grad]
    return all(
        torch.equal(read_tile(p, "fp32"), safe_get_local_fp32_param(p)[: read_tile(p, "fp32").numel()])
        for p in trainable
    )


@dataclass
class Boxed:
    hidden: Tensor


class BoxingTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Boxed:
        return Boxed(self.linear(x))


class BoxingContainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = BoxingTrunk()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).hidden.square().mean()


def dataclass_output(ds: dict[str, Any]) -> None:
    """Train a module that returns a dataclass: DeepSpeed warns that its hooks cannot see the tensors in it."""
    with sharded_build(ds):
        model = BoxingContainer()
    group = {"name": "all", "params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}
    engine = build_engine(model, [group], ds)
    engine.backward(engine(torch.ones(4, 8)))


def hooks_are_light(ds: dict[str, Any]) -> dict[str, bool]:
    engine = tiny.build(ds)
    no_context = torch.autograd.Function.setup_context
    functions = [vars(part)[name] for part in engine.module.modules() for name in ("pre_bwd_fn", "post_bwd_fn")]
    result = {
        "signatures_known": all("__signature__" in vars(function.forward) for function in functions),
        "asks_for_signatures": all(function.setup_context is not no_context for function in functions),
        "linear_is_ours": torch.nn.functional.linear is sharded_linear,
    }
    destroy_engine(engine)
    return result


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def scenarios(runtime: Runtime) -> dict[str, Any]:
    rank, world = runtime.info.rank, runtime.info.world
    recorder = Recorder()
    logging.getLogger("DeepSpeed").addHandler(recorder)
    zero3 = tiny.ds_config("zero3", world)
    zero3_small = tiny.ds_config("zero3", world, stage3_param_persistence_threshold=0)
    zero3_offload = tiny.ds_config("zero3_offload", world)
    zero2 = tiny.ds_config("zero2", world)
    result = {
        "misspelt_key_accepted": misspelt_key_accepted(zero3),
        "stale": stale_gradients(zero3, cure=False),
        "cured": {
            "zero3": stale_gradients(zero3, cure=True),
            "offload": stale_gradients(zero3_offload, cure=True),
            "zero2": stale_gradients(zero2, cure=True),
        },
        "two_forwards": two_forwards_two_backwards(zero3),
        "persistent_write": persistent_write(zero3),
        "buffer": buffer_downcast(tiny.ds_config("zero3", world, bf16=True)),
        "nan": {
            "zero3": nan_on_one_rank(zero3, rank),
            "zero3 bf16": nan_on_one_rank(tiny.ds_config("zero3", world, bf16=True), rank),
            "zero2": nan_on_one_rank(zero2, rank),
            "zero2 bf16": nan_on_one_rank(tiny.ds_config("zero2", world, bf16=True), rank),
        },
        "gradients": {
            f"{name}{' checkpointed' if checkpointing else ''}": container_gradients(ds, runtime, checkpointing)
            for name, ds in {
                "zero3": zero3,
                "zero3 not persistent": zero3_small,
                "zero3 accumulating": tiny.ds_config("zero3", world, accumulation=2),
                "offload": zero3_offload,
                "offload accumulating": tiny.ds_config("zero3_offload", world, accumulation=2),
                "zero2": zero2,
                "zero2 accumulating": tiny.ds_config("zero2", world, accumulation=2),
            }.items()
            for checkpointing in (False, True)
        },
    }
    result["warnings_of_named_tuples"] = [m for m in recorder.messages if "unknown inputs or outputs" in m]
    result["hooks"] = hooks_are_light(zero3)
    dataclass_output(zero3)
    result["warnings_of_dataclass"] = [m for m in recorder.messages if "unknown inputs or outputs" in m]
    return result


if __name__ == "__main__":
    worker_main(scenarios)
