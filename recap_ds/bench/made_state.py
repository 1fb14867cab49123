"""A checkpoint of any size that no training made: the same numbers in our tiles and in DeepSpeed's own ZeRO-3 layout.

Our files are written by the writers that training uses. DeepSpeed's are laid out as its ZeRO-3 engine lays them out, by
hand: an engine would need twenty times the memory. The moments of Adam are there in both, as in a real checkpoint.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds import __version__
from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base_record import BaseRecord
from recap_ds.checkpoint.record import CheckpointRecord, GroupSettings, ParameterRecord
from recap_ds.checkpoint.tile_file import EMA, MASTER, TARGET, StoredTile, write_tile_file
from recap_ds.config import PiStarRECAPConfig
from recap_ds.files.records import write_text
from recap_ds.files.tensors import write_tensor_file
from recap_ds.models.building import MetaBuilder
from recap_ds.models.export_format import VLM_CONFIG_NAME, vlm_config_json
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.contract import RobotContract
from recap_ds.recipe import dump_config

WORLD = 2
# Small beside the VLM, whose size is asked for.
HEADS = {
    "action_expert_hidden_size": 64,
    "action_expert_num_layers": 1,
    "action_expert_num_heads": 2,
    "qv_hidden_size": 64,
    "qv_num_layers": 1,
    "qv_num_heads": 2,
}
STEP = 1
HEAD_DIM = 64
IMAGE_SIZE = 64
Q_PREFIX, TARGET_PREFIX = "critic.q.", "target_critic."
# DeepSpeed cuts its flat groups at sub_group_size; smaller than its default here, so that there are several.
SUB_GROUP_ELEMENTS = 10**8
BYTES_PER_PARAMETER = 40  # of both checkpoints and both exports, on the disk


class MadeState(NamedTuple):
    run: Path  # with one checkpoint of ours
    native: Path  # DeepSpeed's folder of one tag
    num_parameters: int


def make_state(folder: Path, num_parameters: int) -> MadeState:
    """Both checkpoints of a policy of at least ``num_parameters``, as ``WORLD`` ranks would have written them."""
    config = _write_model(folder / "vlm", num_parameters)
    policy = PiStarRECAPPolicy(config, MetaBuilder(torch.float32))
    values = {name: _numbers(index, param.shape) for index, (name, param) in enumerate(policy.named_parameters())}
    trained = {name: values[name] for name, param in policy.named_parameters() if param.requires_grad}
    frozen = {name: tensor for name, tensor in values.items() if name not in trained}
    assert all(name.startswith(TARGET_PREFIX) for name in frozen)
    run = folder / "run"
    _write_run(run, config, policy)
    _write_tiles(run / layout.CHECKPOINTS_NAME / layout.step_name(STEP), trained, frozen)
    native = run / layout.NATIVE_NAME / "zero"
    _write_native(native, trained, frozen)
    return MadeState(run, native, sum(tensor.numel() for tensor in values.values()))


def _write_model(folder: Path, num_parameters: int) -> PiStarRECAPConfig:
    """Recipe of a fully trained VLM, with 24 layers or more in its language model; its config.json in ``folder``."""
    from transformers import PaliGemmaConfig

    num_heads = max(1, int(math.sqrt(num_parameters / 340) / HEAD_DIM))  # a layer has 14.2 x width^2
    width = num_heads * HEAD_DIM
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": num_heads}
    num_layers = math.ceil(num_parameters / ((14 + 2 / num_heads) * width**2))
    vlm_config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "num_hidden_layers": num_layers,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "vocab_size": 512,
            **shared,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "vision_use_head": False,
            **shared,
        },
        projection_dim=width,
        image_token_index=511,
    )
    folder.mkdir(parents=True)
    write_text(folder / VLM_CONFIG_NAME, json.dumps(vlm_config_json(vlm_config)))
    model = {
        "vlm_model_name": str(folder),
        "vlm_random_init": True,
        "freeze_vlm": False,
        "image_size": IMAGE_SIZE,
        **HEADS,
    }
    return PiStarRECAPConfig(name="bench", model=model)


def _numbers(seed: int, shape: torch.Size) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))


def _write_run(run: Path, config: PiStarRECAPConfig, policy: PiStarRECAPPolicy) -> None:
    base = run / layout.BASE_NAME
    base.mkdir(parents=True)
    write_text(run / layout.CONFIG_NAME, dump_config(config))
    write_text(base / VLM_CONFIG_NAME, json.dumps(vlm_config_json(policy.vlm.paligemma.config)))
    BaseRecord(weights="trained", files={}).save(run)
    RobotContract(
        cameras=("front",),
        image_size=IMAGE_SIZE,
        state_dim=config.max_state_dim,
        action_dim=config.max_action_dim,
        fps=10.0,
        tasks={},
        normalizer={},
        manifest_hash="",
    ).save(run)


def _write_tiles(folder: Path, trained: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    online = {Q_PREFIX + name.removeprefix(TARGET_PREFIX): tensor for name, tensor in targets.items()}
    kinds = {MASTER: trained, "exp_avg": trained, "exp_avg_sq": trained, EMA: trained, TARGET: online}
    files = {}
    for rank in range(WORLD):
        name = layout.rank_file_name(rank)
        files[name] = write_tile_file(folder / name, _tiles(kinds, rank))
    files[layout.SHARED_NAME] = write_tensor_file(folder / layout.SHARED_NAME, {})
    CheckpointRecord(
        recap_ds_version=__version__,
        step=STEP,
        adam_step=STEP,
        world=WORLD,
        zero_stage=3,
        precision="float32",
        groups=(GroupSettings(name="all", lr=1e-4, weight_decay=0.0),),
        parameters={name: ParameterRecord(shape=tuple(value.shape), group="all") for name, value in trained.items()},
        shadows={TARGET: tuple(online), EMA: tuple(trained)},
        files=files,
        state={"step": STEP},
    ).save(folder)


def _tiles(kinds: dict[str, dict[str, Tensor]], rank: int) -> Iterator[StoredTile]:
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            start, values = _part(tensor, rank)
            if len(values):
                # The average differs from the masters, so that one in the place of the other is found.
                yield StoredTile(kind, name, start, values.neg() if kind == EMA else values)


def _part(tensor: Tensor, rank: int) -> tuple[int, Tensor]:
    """(start, values) of a rank's part of a flattened parameter; the last may be short or empty."""
    width = -(-tensor.numel() // WORLD)
    start = min(rank * width, tensor.numel())
    return start, tensor.view(-1)[start : start + width]


def _write_native(folder: Path, trained: dict[str, Tensor], frozen: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    for rank in range(WORLD):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: tensor.shape for name, tensor in trained.items()}],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": {name: _padded(tensor, rank) for name, tensor in frozen.items()},
            "shared_params": {},
            "ds_version": "made by hand",
        }
        torch.save(model, folder / f"{prefix}_model_states.pt")
        groups = [torch.cat([_padded(tensor, rank) for tensor in group]) for group in _sub_groups(trained)]
        moments = {index: {"exp_avg": group, "exp_avg_sq": -group} for index, group in enumerate(groups)}
        optimizer = {
            "zero_stage": 3,
            "partition_count": WORLD,
            "fp32_flat_groups": groups,
            "optimizer_state_dict": {"state": moments, "param_groups": []},
        }
        torch.save({"optimizer_state_dict": optimizer}, folder / f"{prefix}_optim_states.pt")


def _padded(tensor: Tensor, rank: int) -> Tensor:
    """A copy of a rank's part, as long as every rank's."""
    width = -(-tensor.numel() // WORLD)
    _, values = _part(tensor, rank)
    return torch.nn.functional.pad(values, (0, width - len(values))).clone()


def _sub_groups(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors.values():
        if groups[-1] and used + tensor.numel() > SUB_GROUP_ELEMENTS:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.numel()
    return groups
