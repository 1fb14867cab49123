"""A batch on its way from a worker: its many small tensors in one, because each costs a file in shared memory.

Images and whatever else is large travel by themselves, so that nothing large is copied once more. What arrives equals
what was sent, in views of the one tensor.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.batch import TransitionBatch, map_tensors

SMALL_BYTES = 2**16
ALIGNMENT = 64


class Place(NamedTuple):
    """Of a small tensor in ``PackedBatch.small``."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PackedBatch(NamedTuple):
    small: Tensor  # [bytes] uint8
    batch: Any  # a TransitionBatch with a Place where each small tensor was


def pack(batch: TransitionBatch) -> PackedBatch:
    small: list[Tensor] = []
    starts = [0]

    def place(tensor: Tensor) -> Tensor | Place:
        if tensor.nbytes > SMALL_BYTES:
            return tensor
        small.append(tensor)
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        return Place(starts[-2], tensor.dtype, tuple(tensor.shape))

    placed = map_tensors(place, batch)
    packed = np.zeros(starts[-1], np.uint8)
    for start, tensor in zip(starts, small, strict=False):
        packed[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    return PackedBatch(torch.from_numpy(packed), placed)


def unpack(packed: PackedBatch) -> TransitionBatch:
    return _unpack(packed.small, packed.batch)


def _unpack(small: Tensor, nest: Any) -> Any:
    if isinstance(nest, Tensor):
        return nest
    if isinstance(nest, Place):
        num_bytes = math.prod(nest.shape) * nest.dtype.itemsize
        return small[nest.start : nest.start + num_bytes].view(nest.dtype).reshape(tuple(nest.shape))
    return type(nest)(*(_unpack(small, part) for part in nest))
