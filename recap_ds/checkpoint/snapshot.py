"""What a checkpoint is made of: this rank's tiles, the small shared tensors, and everything that is no tensor.

Live, for a save that training waits for; or copied to the host, so that training goes on while the copy is written.
"""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

from recap_ds import __version__
from recap_ds.checkpoint.record import CheckpointRecord, GroupSettings, ParameterRecord
from recap_ds.checkpoint.tile_file import StoredTile
from recap_ds.distributed.build import param_is_sharded
from recap_ds.distributed.engine import DeepSpeedEngine, zero_stage
from recap_ds.distributed.host_copy import HostCopy
from recap_ds.distributed.runtime import RankInfo
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.tiles import KEYS, local_tiles, read_adam_step, read_tile


class Snapshot(NamedTuple):
    record: CheckpointRecord  # without files, which are not there yet
    tiles: list[StoredTile]
    tensors: dict[str, Tensor]  # equal on every rank; rank 0's are written

    def on_host(self, room: HostCopy) -> "Snapshot":
        """The same, with nothing in it that training changes. Valid until ``room`` is used again."""
        copies = room.take([tile.values for tile in self.tiles])
        tiles = [tile._replace(values=copy) for tile, copy in zip(self.tiles, copies, strict=True)]
        # A copy even where they are on the host already.
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return Snapshot(self.record, tiles, tensors)


def take_snapshot(
    engine: DeepSpeedEngine,
    shadows: Mapping[str, Shadow],
    info: RankInfo,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Snapshot:
    """Only between optimizer steps. Its tensors are live: nothing is copied yet."""
    settings = [
        GroupSettings(name=group["name"], lr=group["lr"], weight_decay=group["weight_decay"])
        for group in engine.optimizer.param_groups
    ]
    record = CheckpointRecord(
        recap_ds_version=__version__,
        saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        step=step,
        adam_step=read_adam_step(engine),
        world=info.world,
        zero_stage=zero_stage(engine),
        precision=str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        groups=tuple(settings),
        parameters=trainable_parameters(engine),
        shadows={kind: shadow_names(shadow) for kind, shadow in shadows.items()},
        files={},
        state=dict(state),
    )
    return Snapshot(record, live_tiles(engine, shadows), dict(tensors))


def live_tiles(engine: DeepSpeedEngine, shadows: Mapping[str, Shadow]) -> list[StoredTile]:
    """What this rank owns, as it is now and will be; a small parameter may lie in other ranks' parts altogether."""
    params = dict(engine.module.named_parameters())
    tiles = [
        StoredTile(key, tile.name, tile.start, read_tile(params[tile.name], key))
        for tile in local_tiles(engine)
        for key in (KEYS if tile.length else ())
    ]
    for kind, shadow in shadows.items():
        tiles += [StoredTile(kind, tile.name, tile.start, values) for tile, values in shadow.tiles() if tile.length]
    return tiles


def trainable_parameters(engine: DeepSpeedEngine) -> dict[str, ParameterRecord]:
    """Name -> whole shape and optimizer group, in the model's order."""
    params = dict(engine.module.named_parameters())
    return {
        tile.name: ParameterRecord(shape=_whole_shape(params[tile.name]), group=tile.group)
        for tile in local_tiles(engine)
    }


def shadow_names(shadow: Shadow) -> tuple[str, ...]:
    return tuple(tile.name for tile, _ in shadow.tiles())


def _whole_shape(param: Parameter) -> tuple[int, ...]:
    return tuple(param.ds_shape if param_is_sharded(param) else param.shape)
