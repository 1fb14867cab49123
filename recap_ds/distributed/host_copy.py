"""Copies of tensors in host memory that is allocated once and filled again at every save.

Page-locked where the accelerator can do it: then copying runs at the bus's speed and only the wait at the end stalls
training. Knows nothing of what the tensors are.
"""

from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

# Page-locked memory is handed out in powers of two: pieces of one keep what is lost to rounding small.
CHUNK_ELEMENTS = 2**26


class HostCopy:
    """Room for float32 tensors of the shapes of ``tensors``, in their order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies: list[Tensor] = []
        chunk: list[Tensor] = []
        for tensor in tensors:
            assert tensor.dtype == torch.float32, tensor.dtype
            if chunk and sum(map(torch.numel, chunk)) + tensor.numel() > CHUNK_ELEMENTS:
                self._allocate(chunk)
                chunk = []
            chunk.append(tensor)
        self._allocate(chunk)

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        memory = get_accelerator().pin_empty(sum(sizes), dtype=torch.float32)
        self._copies += [piece.view(tensor.shape) for piece, tensor in zip(memory.split(sizes), tensors, strict=True)]

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The copies, which the next ``take`` writes over. Waits for the device."""
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        get_accelerator().synchronize()
        return self._copies
