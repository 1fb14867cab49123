"""Running averages of online parameters in fp32: the target critic and the policy's exponential moving average.

Every rank averages the tiles it owns with its fp32 masters, so an update needs no communication under ZeRO-3 and never
rounds to bf16, where a Polyak rate of 0.005 stands still. Update only after an applied step: a skipped one changed
nothing, and within gradient accumulation nothing is ready.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from recap_ds.distributed.build import param_is_sharded
from recap_ds.distributed.reduce import sum_over_ranks
from recap_ds.distributed.tiles import Tile, local_shard, local_span, read_tile, write_local_shard

# Elements in one all-reduce of replicated weights (ZeRO-2): bounds the buffer without many small messages.
BUCKET_ELEMENTS = 2**26


class Shadow:
    """fp32 averages of ``online`` parameters, optionally written through into frozen ``targets`` of the same shapes.

    Both map a name to a parameter; ``targets`` has the same keys. Starts as a copy of the online parameters.
    """

    def __init__(self, online: Mapping[str, Parameter], targets: Mapping[str, Parameter] | None = None) -> None:
        assert online, "nothing to average"
        assert all(param.requires_grad for param in online.values()), "only trainable parameters have fp32 masters"
        self._online = dict(online)
        self._targets = None if targets is None else {name: targets[name] for name in online}
        for name, target in (self._targets or {}).items():
            assert not target.requires_grad and _whole_shape(target) == _whole_shape(online[name]), name
        # Beside the masters, so on the host where those are offloaded. Every rank has every name: a piece may be empty.
        self._values = {name: torch.empty_like(read_tile(param, "fp32")) for name, param in online.items()}
        self.copy_from_online()

    @torch.no_grad()
    def copy_from_online(self) -> None:
        """Forget the average. With targets under ZeRO-2 - Collective: every rank must call."""
        for name, value in self._values.items():
            value.copy_(read_tile(self._online[name], "fp32"))
        self.write_targets()

    @torch.no_grad()
    def lerp(self, rate: float) -> None:
        """shadow += rate * (online - shadow). With targets under ZeRO-2 - Collective: every rank must call."""
        masters = [read_tile(self._online[name], "fp32") for name in self._values]
        torch._foreach_lerp_(list(self._values.values()), masters, rate)
        self.write_targets()

    def write_targets(self) -> None:
        """Round the averages into the targets' forward copies; after ``load_tile``, before the next forward.

        With targets under ZeRO-2 - Collective: every rank must call.
        """
        if self._targets is not None:
            self._write_into(self._targets)

    def tiles(self) -> list[tuple[Tile, Tensor]]:
        """This rank's tiles and their live fp32 values, for a checkpoint."""
        return [(Tile(name, *local_span(self._online[name]), group=""), value) for name, value in self._values.items()]

    @torch.no_grad()
    def load_tile(self, name: str, values: Tensor) -> None:
        """Set this rank's whole tile of ``name``; call ``write_targets`` after the last."""
        assert values.shape == self._values[name].shape, (name, values.shape)
        self._values[name].copy_(values)

    @contextlib.contextmanager
    def swapped_into_online(self) -> Iterator[None]:
        """The averages in the online parameters' forward copies inside, the originals back afterwards, bit for bit.

        fp32 masters and Adam's state are not touched, so do not step inside. ZeRO-3 needs no communication; under
        ZeRO-2 - Collective: every rank must call.
        """
        originals = {name: local_shard(param).clone() for name, param in self._online.items()}
        try:
            self._write_into(self._online)
            yield
        finally:
            for name, original in originals.items():
                write_local_shard(self._online[name], original)

    def _write_into(self, params: Mapping[str, Parameter]) -> None:
        replicated = [name for name, param in params.items() if not param_is_sharded(param)]
        for name, value in self._values.items():
            if param_is_sharded(params[name]):
                write_local_shard(params[name], value)
        for names in _buckets(replicated, params):
            self._write_replicated(names, params)

    @torch.no_grad()
    def _write_replicated(self, names: Sequence[str], params: Mapping[str, Parameter]) -> None:
        """Each rank knows its tiles only: put them into zeros and add those up. Exact, as tiles do not overlap."""
        first = params[names[0]]
        whole = torch.zeros(sum(params[name].numel() for name in names), dtype=first.dtype, device=first.device)
        pieces = dict(zip(names, whole.split([params[name].numel() for name in names]), strict=True))
        for name in names:
            start, length = local_span(self._online[name])
            pieces[name][start : start + length].copy_(self._values[name])
        summed = sum_over_ranks(whole).split([params[name].numel() for name in names])
        for name, values in zip(names, summed, strict=True):
            write_local_shard(params[name], values)


def _whole_shape(param: Parameter) -> torch.Size:
    return param.ds_shape if param_is_sharded(param) else param.shape


def _buckets(names: Sequence[str], params: Mapping[str, Parameter]) -> Iterator[list[str]]:
    """Split ``names`` into runs of at most BUCKET_ELEMENTS (one larger parameter goes alone), all of one dtype."""
    bucket: list[str] = []
    elements = 0
    for name in names:
        param = params[name]
        if bucket and (elements + param.numel() > BUCKET_ELEMENTS or param.dtype != params[bucket[0]].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(name)
        elements += param.numel()
    if bucket:
        yield bucket
