"""The pieces of every parameter that this rank owns, read and written without communication.

A tile is a run of a parameter's flattened values: under ZeRO-3 the rank's shard of it, under ZeRO-2 what falls into the
rank's part of the flat optimizer buffer. Tiles of all ranks cover every trainable parameter exactly once, whatever the
stage, the world size or the sub-groups; that is what lets a checkpoint move between them.

Knows no files and no names of files. Nothing here is pickled.
"""

from typing import Literal, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import lazy_init_hp_params_optimizer_state
from torch import Tensor
from torch.nn import Parameter

from recap_ds.distributed.build import param_is_sharded
from recap_ds.distributed.engine import flat_masters, zero_stage

Key = Literal["fp32", "exp_avg", "exp_avg_sq"]
KEYS: tuple[Key, ...] = ("fp32", "exp_avg", "exp_avg_sq")


class Tile(NamedTuple):
    name: str  # of the parameter, as in model.named_parameters()
    start: int  # in the flattened parameter
    length: int
    group: str  # of the optimizer


def local_tiles(engine: DeepSpeedEngine) -> list[Tile]:
    """What this rank owns of every trainable parameter, in the model's order: the same names on every rank.

    A tile may be empty: the last rank's part of a small parameter. Every key of them can be read and written.
    """
    ensure_adam_state(engine)
    group_names = _group_names(engine)
    return [
        Tile(name, *local_span(param), group_names[param])
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    ]


def _group_names(engine: DeepSpeedEngine) -> dict[Parameter, str]:
    optimizer = engine.optimizer
    if zero_stage(engine) == 3:
        flat_groups, group_of = optimizer.fp16_groups, optimizer.sub_group_to_group_id
    else:
        flat_groups, group_of = optimizer.bit16_groups, range(len(optimizer.bit16_groups))
    names = [group["name"] for group in optimizer.param_groups]
    return {param: names[group_of[index]] for index, params in enumerate(flat_groups) for param in params}


def local_span(param: Parameter) -> tuple[int, int]:
    """(start, length) of this rank's piece of a parameter's flattened values.

    A frozen parameter under ZeRO-2 is whole on every rank.
    """
    if param_is_sharded(param):
        width = param.ds_tensor.ds_numel
        start = min(torch.distributed.get_rank(param.ds_process_group) * width, param.ds_numel)
        return start, min(width, param.ds_numel - start)
    if not param.requires_grad:
        return 0, param.numel()
    mapping = param._hp_mapping
    if mapping is None:
        return 0, 0
    return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def read_tile(param: Parameter, key: Key) -> Tensor:
    """[length] fp32 values of this rank's tile: a live view, on the host where the optimizer is offloaded.

    The same numbers as DeepSpeed's ``safe_get_local_*`` without their copy to the device, less the padding.
    """
    if not param_is_sharded(param):
        mapping = param._hp_mapping
        if mapping is None:  # all of it lies in other ranks' parts
            return torch.empty(0, dtype=torch.float32, device=param.device)
        return mapping.get_hp_fragment(None if key == "fp32" else key).detach()
    optimizer = param._z3_optimizer
    flat_index, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    flat = optimizer.fp32_partitioned_groups_flat[flat_index]
    values = flat if key == "fp32" else optimizer.optimizer.state[flat][key]
    return values.detach().narrow(0, offset, local_span(param)[1])


@torch.no_grad()
def write_tile(param: Parameter, key: Key, values: Tensor) -> None:
    """Set this rank's tile from [length] values. After the last fp32 tile call ``refresh_forward_copies``."""
    tile = read_tile(param, key)
    assert values.shape == tile.shape, (values.shape, tile.shape)
    tile.copy_(values)
    if key == "fp32" and param_is_sharded(param):
        write_local_shard(param, tile)  # else the forward would use the old weights until the next step


def refresh_forward_copies(engine: DeepSpeedEngine) -> None:
    """Make the forward use the fp32 tiles just written. Collective: every rank must call."""
    if zero_stage(engine) != 3:
        engine.optimizer.update_lp_params()
        return
    for param in engine.module.parameters():
        _drop_gathered_copies(param)  # also of parameters that only other ranks wrote


@torch.no_grad()
def ensure_adam_state(engine: DeepSpeedEngine) -> None:
    """Create Adam's zero moments where no step was taken yet: torch makes them only in the first step."""
    state_of = engine.optimizer.optimizer.state
    fused = engine.optimizer.param_groups[0]["fused"]
    for flat in flat_masters(engine):
        if not state_of[flat]:
            step = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            state_of[flat] = {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    if zero_stage(engine) != 3:
        # Stage 2 reads the moments through every parameter's view of them. DeepSpeed makes those after stepping the
        # first group, when the others have no moments yet.
        for params, flat in zip(engine.optimizer.bit16_groups, flat_masters(engine), strict=True):
            lazy_init_hp_params_optimizer_state(params, flat, state_of)


def read_adam_step(engine: DeepSpeedEngine) -> int:
    """Optimizer steps applied so far, which Adam's bias correction needs. One number: groups are stepped together."""
    ensure_adam_state(engine)
    steps = {int(engine.optimizer.optimizer.state[flat]["step"].item()) for flat in flat_masters(engine)}
    assert len(steps) == 1, f"flat groups were stepped {steps} times"
    return steps.pop()


def write_adam_step(engine: DeepSpeedEngine, step: int) -> None:
    ensure_adam_state(engine)
    for flat in flat_masters(engine):
        engine.optimizer.optimizer.state[flat]["step"].fill_(step)


def local_shard(param: Parameter) -> Tensor:
    """[length] view of what the forward uses, in its dtype: the shard under ZeRO-3, else the whole parameter."""
    if not param_is_sharded(param):
        return param.detach().view(-1)
    _, length = local_span(param)
    return param.ds_tensor.detach()[:length]


@torch.no_grad()
def write_local_shard(param: Parameter, values: Tensor) -> None:
    """Set what ``local_shard`` reads; the next forward uses it. The only place that writes shards.

    Only between a step and the next forward. Needs no communication, yet every rank must write the same parameters,
    even where its own piece is empty: ranks that disagree on what is gathered hang in the next forward.
    """
    if param_is_sharded(param):
        _drop_gathered_copies(param)
    target = local_shard(param)
    assert values.shape == target.shape, (values.shape, target.shape)
    target.copy_(values)


def _drop_gathered_copies(param: Parameter) -> None:
    """Two copies of a shard can outlive a step and would hide a write to it: small parameters stay gathered, and with
    hpZ a frozen parameter keeps its secondary shard for ever."""
    if param.ds_status is ZeroParamStatus.AVAILABLE:
        param.partition()
    assert param.ds_status is ZeroParamStatus.NOT_AVAILABLE, "a gather of this parameter is under way"
    param.ds_secondary_tensor = None
