"""How a model's parameters come to be: plainly or as shapes alone here, sharded in ``distributed/build.py``.

Under ZeRO-3 a child's weights are already partitioned when its parent's ``__init__`` goes on, so a parent that
initialises or loads them does nothing, silently. Everything that sets a weight after its own module was built
therefore goes through ``Builder.write``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from recap_ds.files.tensor_reader import FileTensor
from recap_ds.files.tensors import PIECE_ELEMENTS


class Builder:
    """Plain PyTorch: whole parameters on one device."""

    # False: parameters are shapes, and ``fill`` has nothing to put into them.
    holds_values = True

    def context(self) -> AbstractContextManager:
        """Entered while modules are constructed."""
        return nullcontext()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter from a tensor of its full shape, casting to its dtype."""
        with torch.no_grad():
            parameter.copy_(value)

    def write_from_file(self, parameter: nn.Parameter, value: FileTensor) -> None:
        """Like ``write``; no more is read than is kept here, and a piece at a time."""
        with torch.no_grad():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), PIECE_ELEMENTS):
                piece = flat[start : start + PIECE_ELEMENTS]
                piece.copy_(value.read(start, piece.numel()))

    def copy(self, source: nn.Module, target: nn.Module) -> None:
        """Make ``target``'s parameters equal to ``source``'s, right after both were built."""
        for to, value in zip(target.parameters(), source.parameters(), strict=True):
            self.write(to, value)

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape


class MetaBuilder(Builder):
    """Shapes and dtypes without memory, on torch's meta device: what a model would be, at any size."""

    holds_values = False

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    @contextmanager
    def context(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(before)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        assert value.shape == parameter.shape, (value.shape, parameter.shape)


def fill(module: nn.Module, values: Iterator[tuple[str, Tensor | FileTensor]], builder: Builder) -> None:
    """Write ``values`` into the parameters they name: every parameter exactly once, shapes equal.

    Raises ValueError naming what is missing, unknown or of another shape; nothing is loaded "best case". Values are
    not even read for a builder that holds none.
    """
    if not builder.holds_values:
        return
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
        if isinstance(value, FileTensor):
            builder.write_from_file(parameters[name], value)
        else:
            builder.write(parameters[name], value)
        missing.discard(name)
    if missing:
        raise ValueError(f"no tensor for {len(missing)} parameters, the first is '{min(missing)}'")
