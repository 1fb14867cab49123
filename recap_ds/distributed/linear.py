"""Linear layers and module hooks under ZeRO-3, at less cost than DeepSpeed's own (0.19.8).

PyTorch's linear layer keeps a view of its weight for the backward, which would hold every gathered weight in memory,
so ``zero.Init`` puts ``runtime/zero/linear.py`` in its place for the whole process. That one adds the bias in a pass of
its own over a batch of sequences, keeps the input even where the weight is frozen, and is called through
``setup_context``, for which PyTorch inspects the signature of ``forward`` at every call: 0.2 ms of Python each, and 850
calls in a step of a small model, two thirds of them from the hooks that DeepSpeed puts around every module.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import nvtx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_whole_linear: Linear = nn.functional.linear
# Under these names every module holds the autograd Functions of its own hooks (runtime/zero/parameter_offload.py).
_HOOK_FUNCTIONS = {"pre_bwd_fn", "post_bwd_fn"}


class _ShardedLinear(torch.autograd.Function):
    """y [..., out] = x [..., in] @ weight [out, in].T + bias [out]; the parameter is kept, not its gathered storage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _whole_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad.matmul(weight) if of_x else None,  # DeepSpeed's hooks have gathered it again
            rows.t().matmul(x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def sharded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose weight may be sharded again between forward and backward."""
    return _ShardedLinear.apply(x, weight, bias)


def replace_linear() -> None:
    """For the whole process, where DeepSpeed has put its own in; not where ``memory_efficient_linear`` is false."""
    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = sharded_linear


@contextmanager
def linear_is(linear: Linear) -> Iterator[None]:
    """Linear layers of this process, while inside."""
    before = nn.functional.linear
    nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = before


def lighten_hooks(module: nn.Module) -> None:
    """After the engine was made, for the whole process: its hooks do what they did, with less Python around it.

    ``inspect.signature`` finds an answer where it looks first, and looks no further. No NVTX ranges around each of the
    thousands of calls within DeepSpeed: to see them in a profiler, set this flag back.
    """
    for part in module.modules():
        for name in _HOOK_FUNCTIONS & vars(part).keys():  # the parts of a leaf module have none
            function = vars(part)[name]
            function.forward.__signature__ = inspect.signature(function.forward)
    nvtx.enable_nvtx = False
