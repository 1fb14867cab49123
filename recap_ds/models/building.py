"""How a model's parameters come to be: plainly here, sharded in ``distributed/build.py``.

Under ZeRO-3 a child's weights are already partitioned when its parent's ``__init__`` goes on, so a parent that
initialises or loads them does nothing, silently. Everything that sets a weight after its own module was built
therefore goes through ``Builder.write``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class Builder:
    """Plain PyTorch: whole parameters on one device."""

    def context(self) -> AbstractContextManager:
        """Entered while modules are constructed."""
        return nullcontext()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter from a tensor of its full shape, casting to its dtype."""
        with torch.no_grad():
            parameter.copy_(value)

    def copy(self, source: nn.Module, target: nn.Module) -> None:
        """Make ``target``'s parameters equal to ``source``'s, right after both were built."""
        for to, value in zip(target.parameters(), source.parameters(), strict=True):
            self.write(to, value)

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape


def fill(module: nn.Module, values: Iterator[tuple[str, Tensor]], builder: Builder) -> None:
    """Write ``values`` into the parameters they name: every parameter exactly once, shapes equal.

    Raises ValueError naming what is missing, unknown or of another shape; nothing is loaded "best case".
    """
    parameters = dict(module.named_parameters())
    missing = set(parameters)
    for name, value in values:
        if name not in parameters:
            raise ValueError(f"tensor '{name}' has no place in the model")
        expected = tuple(builder.full_shape(parameters[name]))
        if tuple(value.shape) != expected:
            raise ValueError(f"tensor '{name}' has shape {tuple(value.shape)}, the model needs {expected}")
        if name not in missing:
            raise ValueError(f"tensor '{name}' appears twice")
        builder.write(parameters[name], value)
        missing.discard(name)
    if missing:
        raise ValueError(f"no tensor for {len(missing)} parameters, the first is '{min(missing)}'")
