"""The sharded counterpart of ``models.building.Builder``: same verbs, every rank keeps only its shard."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from recap_ds.distributed.build import param_is_sharded, sharded_build
from recap_ds.distributed.tiles import local_shard, local_span, write_local_shard
from recap_ds.files.tensor_reader import FileTensor


class ShardedBuilder:
    """Builds for the engine that ``ds_config`` describes. Values written must be the same on every rank."""

    holds_values = True

    def __init__(self, ds_config: dict[str, Any], device: torch.device):
        self._ds_config = ds_config
        self.device = device

    def context(self) -> AbstractContextManager:
        """Collective: every rank must call."""
        return sharded_build(self._ds_config)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Keep this rank's slice of the whole ``value``: no communication, one tensor in memory at a time."""
        if not param_is_sharded(parameter):
            with torch.no_grad():
                parameter.copy_(value)
            return
        start, length = local_span(parameter)
        write_local_shard(parameter, value.reshape(-1)[start : start + length])

    def write_from_file(self, parameter: nn.Parameter, value: FileTensor) -> None:
        """Like ``write``; a rank reads its own slice and nothing else, so that all of them read a file once."""
        if not param_is_sharded(parameter):
            self.write(parameter, value.whole())
            return
        write_local_shard(parameter, value.read(*local_span(parameter)))

    def copy(self, source: nn.Module, target: nn.Module) -> None:
        """Shard to shard: parameters of the same shape are cut in the same places."""
        for to, value in zip(target.parameters(), source.parameters(), strict=True):
            write_local_shard(to, local_shard(value))

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if param_is_sharded(parameter) else parameter.shape
