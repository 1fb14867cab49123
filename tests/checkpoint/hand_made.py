"""Run folders made by hand from a plain policy: no engine, no ranks, tiles cut wherever the test likes."""

import json
from pathlib import Path

import torch
from torch import Tensor

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import BaseRecord
from recap_ds.checkpoint.record import CheckpointRecord, GroupSettings, ParameterRecord
from recap_ds.checkpoint.tile_file import StoredTile, write_tile_file
from recap_ds.config import PiStarRECAPConfig
from recap_ds.files.records import write_text
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.models.export_format import VLM_CONFIG_NAME, VLM_WEIGHTS_NAME, split_adapter, stored_name, vlm_config_json
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.recipe import dump_config
from tests.made_export import CONTRACT
from tests.tiny import tiny_config

KINDS = {
    "frozen": {"model": {"freeze_vlm": True}},
    "lora": {"lora": {"enabled": True, "rank": 2, "alpha": 3.0}},
    "full": {"model": {"freeze_vlm": False}},
}


def make_config(kind: str) -> PiStarRECAPConfig:
    """``kind`` of VLM: frozen, lora or full; with rates at which a few steps move every parameter visibly."""
    rates = {"learning_rate": 1e-3, "vlm_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    return tiny_config(training=rates, name=f"tiny_{kind}", **KINDS[kind])


def make_run(run: Path, policy: PiStarRECAPPolicy, steps: tuple[int, ...] = (5,), world: int = 3) -> None:
    """``policy``'s tensors as checkpoints: masters as they are, the average 1 higher, the target 2 higher."""
    run.mkdir(parents=True)
    (run / layout.CONFIG_NAME).write_text(dump_config(policy.config))
    CONTRACT.save(run)
    make_base(run, policy)
    for step in steps:
        make_checkpoint(run / layout.CHECKPOINTS_NAME / layout.step_name(step), policy, step, world)
    layout.set_link(run / layout.CHECKPOINTS_NAME, layout.LATEST, max(steps))
    layout.set_link(run / layout.CHECKPOINTS_NAME, layout.BEST, min(steps))


def make_base(run: Path, policy: PiStarRECAPPolicy) -> None:
    base = run / layout.BASE_NAME
    base.mkdir()
    write_text(base / VLM_CONFIG_NAME, json.dumps(vlm_config_json(policy.vlm.paligemma.config)))
    if not policy.config.model.freeze_vlm:
        BaseRecord(weights="trained", files={}).save(run)
        return
    params = {name: TensorSource.of(param.detach()) for name, param in policy.vlm.paligemma.named_parameters()}
    frozen = {stored_name(name): source for name, source in split_adapter(params)[0].items()}
    written = write_tensor_file(base / VLM_WEIGHTS_NAME, frozen)
    BaseRecord(weights="run", files={VLM_WEIGHTS_NAME: written}).save(run)


def make_checkpoint(folder: Path, policy: PiStarRECAPPolicy, step: int, world: int) -> None:
    folder.mkdir(parents=True)
    params = {name: param.detach() for name, param in policy.named_parameters() if param.requires_grad}
    online = [name for name in params if name.startswith("critic.q.")]
    kinds = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), params)
    kinds["ema"] = {name: param + 1 for name, param in params.items()}
    kinds["target"] = {name: params[name] + 2 for name in online}
    files = {}
    for rank in range(world):
        tiles = [
            StoredTile(kind, name, start, values)
            for kind, tensors in kinds.items()
            for name, tensor in tensors.items()
            for start, values in [cut(tensor, rank, world)]
            if len(values)
        ]
        name = layout.rank_file_name(rank)
        files[name] = write_tile_file(folder / name, tiles)
    files[layout.SHARED_NAME] = write_tensor_file(folder / layout.SHARED_NAME, {})
    CheckpointRecord(
        recap_ds_version="0",
        step=step,
        adam_step=step,
        world=world,
        zero_stage=3,
        precision="float32",
        groups=(GroupSettings(name="critic", lr=1e-3, weight_decay=0.0),),
        parameters={name: ParameterRecord(shape=tuple(param.shape), group="critic") for name, param in params.items()},
        shadows={"target": tuple(online), "ema": tuple(params)},
        files=files,
        state={"step": step},
    ).save(folder)


def cut(tensor: Tensor, rank: int, world: int) -> tuple[int, Tensor]:
    """(start, values) of a rank's piece: as ZeRO-3 cuts, with the last pieces short or empty."""
    flat = tensor.reshape(-1)
    width = -(-flat.numel() // world)
    start = min(rank * width, flat.numel())
    return start, flat[start : start + width]


def expected_targets(policy: PiStarRECAPPolicy) -> dict[str, Tensor]:
    return {name: param.detach() + 2 for name, param in policy.critic.q.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, the same names."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
