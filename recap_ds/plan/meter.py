"""What a forward and backward hold and compute: bytes by storage and floating-point operations by kernel.

Every operation is seen below autograd as it runs, recomputation and backward included. A storage counts from the
operation that made it until its last owner lets go, so views cost nothing and temporaries count while they live. It
works on the meta device, where tensors have sizes and no memory, and on any other.

What the allocator adds (rounding, fragments) and what kernels use inside themselves it cannot know.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class StepMeter(TorchDispatchMode):
    """``peak_bytes``: the most that was alive at once; ``flops``: two for every multiply-add of matrix products,
    convolutions and attention, which is nearly all there is.

    ``outside``: tensors that are accounted for elsewhere, such as parameters.
    """

    def __init__(self, outside: Iterable[Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._outside = {_key(tensor) for tensor in outside}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once, for as long as it lives."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive or key in self._outside:
            return
        self._alive.add(key)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= num_bytes


class SavedTensors:
    """``num_bytes`` that autograd keeps for backward: every storage once, those of ``outside`` not at all."""

    def __init__(self, outside: Iterable[Tensor]):
        self._outside = {_key(tensor) for tensor in outside}
        self._kept: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """At this moment: what a part of the graph kept counts no longer once that part is gone."""
        return sum(self._kept.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around the forward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._outside and key not in self._kept:
            self._kept[key] = storage.nbytes()
            weakref.finalize(storage, self._kept.pop, key)
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as it runs on a GPU, for tensors on meta: torch takes the plain formula there, which would keep every
    score. Boolean masks become biases in the queries' dtype first, as torch does it for the fused kernel.
    """
    plain = torch.nn.functional.scaled_dot_product_attention
    # Not a torch function mode: backward recomputes blocks where no such mode is on.
    torch.nn.functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    bias = attn_mask
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
