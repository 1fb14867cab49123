"""Sums, maxima and gathers over ranks. One process needs no group: there every function returns its input.

Results are new tensors; the argument is never written.
"""

import torch
import torch.distributed
from torch import Tensor


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Collective: every rank must call."""
    return _all_reduce(tensor, torch.distributed.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Collective: every rank must call."""
    return _all_reduce(tensor, torch.distributed.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, op=operation)
    return total


def gather_flat(tensor: Tensor) -> Tensor:
    """[n] of every rank, in rank order, as [world * n]. n must be the same everywhere.

    Collective: every rank must call.
    """
    assert tensor.dim() == 1, tensor.shape
    if world_size() == 1:
        return tensor
    if tensor.dtype == torch.bool:  # not every backend moves bools
        return gather_flat(tensor.to(torch.uint8)).to(torch.bool)
    gathered = torch.empty(world_size() * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    torch.distributed.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def agree(flag: int, device: torch.device) -> int:
    """The largest ``flag`` of any rank, on all of them: False and True, or an ordered code. Waits for the device.

    Collective: every rank must call.
    """
    return int(max_over_ranks(torch.tensor([int(flag)], dtype=torch.int64, device=device)).item())
