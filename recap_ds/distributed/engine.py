"""One DeepSpeed engine around one container module, and the care ZeRO-3 needs around its step.

The rule: one ``engine(...)`` per ``engine.backward``, and every trainable parameter used in every step. Order at a
boundary: backward, [grad_norms_by_group], ``engine.step()``, zero_stale_gradients, step_was_applied.

Does not know models, losses or learning-rate schedules: the caller sets ``lr`` on ``engine.optimizer.param_groups``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from recap_ds.distributed.linear import lighten_hooks
from recap_ds.distributed.reduce import sum_over_ranks
from recap_ds.distributed.runtime import accelerator_is_cpu


class ParameterGroup(TypedDict):
    name: str
    params: Sequence[nn.Parameter]
    lr: float
    weight_decay: float


def build_engine(
    model: nn.Module,
    parameter_groups: Sequence[ParameterGroup],
    ds_config: dict[str, Any],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
) -> DeepSpeedEngine:
    """The engine, with torch's AdamW over ``parameter_groups``. Collective: every rank must call.

    Frozen parameters belong to no group and stay frozen: DeepSpeed fixes what it optimises here, once.
    """
    _check_groups(model, parameter_groups)
    # Fused: one pass over the flat shards and no temporaries as large as they are; on the host it is vectorised too.
    # On a CPU-only machine the plain loop is as fast and the same everywhere.
    fused = not accelerator_is_cpu()
    optimizer = torch.optim.AdamW([dict(group) for group in parameter_groups], betas=betas, eps=adam_eps, fused=fused)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if zero_stage(engine) == 3:
        lighten_hooks(engine.module)
    return engine


def _check_groups(model: nn.Module, parameter_groups: Sequence[ParameterGroup]) -> None:
    grouped = [id(param) for group in parameter_groups for param in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    trainable = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    forgotten = [name for key, name in trainable.items() if key not in set(grouped)]
    assert not forgotten, f"trainable, but in no optimizer group: {forgotten[:5]}"
    assert set(grouped) <= trainable.keys(), "an optimizer group holds a frozen parameter"
    assert all(group["params"] for group in parameter_groups), "an optimizer group is empty"


def zero_stage(engine: DeepSpeedEngine) -> int:
    return int(engine.zero_optimization_stage())


def offloads_optimizer(engine: DeepSpeedEngine) -> bool:
    return bool(engine.zero_use_cpu_optimizer())


@torch.no_grad()
def zero_stale_gradients(engine: DeepSpeedEngine) -> None:
    """After every ``engine.step()``: forget the gradients of a step that ended, applied or skipped.

    Does nothing within gradient accumulation, where they are still needed. ZeRO-3 re-applies the last gradient of any
    parameter that gets none in a later step, and a NaN kept there makes it skip every step from then on (deepspeed
    0.19.8, ``independent_gradient_partition_epilogue``). Local and cheap.
    """
    if engine.micro_steps % engine.gradient_accumulation_steps():
        return
    if zero_stage(engine) == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
    if offloads_optimizer(engine):
        for master in flat_masters(engine):
            master.grad.zero_()


def flat_masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's flat fp32 tensors, by which torch's optimizer keys its state: sub-groups, or under ZeRO-2 groups."""
    optimizer = engine.optimizer
    return (
        optimizer.fp32_partitioned_groups_flat if zero_stage(engine) == 3 else optimizer.single_partition_of_fp32_groups
    )


def step_was_applied(engine: DeepSpeedEngine) -> bool:
    """False within gradient accumulation, and where NaN or inf on any rank made all ranks skip."""
    return bool(engine.was_step_applied())


def global_grad_norm(engine: DeepSpeedEngine) -> Tensor:
    """Norm of all gradients of the last step before clipping; inf where it was skipped. No wait for the device."""
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32)


@torch.no_grad()
def grad_norms_by_group(engine: DeepSpeedEngine) -> Tensor:
    """[groups] fp32 norms before clipping, in the order of the parameter groups.

    Only between the last backward of a step and ``engine.step()``. Collective: every rank must call.
    """
    assert engine.is_gradient_accumulation_boundary(), "gradients are complete only at the boundary"
    squares = torch.zeros(len(engine.optimizer.param_groups), dtype=torch.float32, device=engine.device)
    for group_index, gradients in _local_gradients(engine):
        norms = torch._foreach_norm([gradient.float() for gradient in gradients])
        squares[group_index] += torch.stack(norms).square().sum().to(engine.device)
    return sum_over_ranks(squares).sqrt()


def _local_gradients(engine: DeepSpeedEngine) -> Iterator[tuple[int, list[Tensor]]]:
    """(group, averaged gradient shards of this rank), a pair for every flat partition."""
    optimizer = engine.optimizer
    for index, master in enumerate(flat_masters(engine)):
        group_index = optimizer.sub_group_to_group_id[index] if zero_stage(engine) == 3 else index
        gradients = [master.grad] if offloads_optimizer(engine) else list(optimizer.averaged_gradients[index])
        yield group_index, gradients


def destroy_engine(engine: DeepSpeedEngine) -> None:
    """Remove its hooks and release its buffers; the module may still be dropped by the caller."""
    engine.destroy()
