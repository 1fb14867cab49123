"""Does our pi0 / pi0.5 compute what another implementation did? Reference weights, inputs and outputs in one folder.

    model.safetensors   its weights, by the published names
    config.json         ``ReferenceConfig``
    io.npz              image<i> [B, 3, P, P] in [-1, 1], image_mask<i> [B], tokens, token_mask [B, L], actions, noise,
                        x_t, loss (per element), sampled [B, H, A], time [B]; of pi0 also state [B, S]

All arithmetic is float32. B batch   C cameras   P image side   L prompt tokens   H chunk   A action dims   S state dims
"""

import json
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from torch import Tensor

from recap_ds.algo.flow_matching import noisy_action, target_velocity
from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.pi_joint import PiDimensions, PiJointExpert
from recap_ds.models.pi_weights import load_pi_weights
from recap_ds.models.sampling import sample_actions
from recap_ds.models.vlm import build_paligemma, encode_with_layers

WEIGHTS_NAME, CONFIG_NAME, IO_NAME = "model.safetensors", "config.json", "io.npz"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TowerConfig(_Part):
    width: PositiveInt
    depth: PositiveInt
    mlp_dim: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt


class TextConfig(TowerConfig):
    vocab_size: PositiveInt


class ExpertConfig(TowerConfig):
    adarms: bool


class VisionConfig(_Part):
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    patch_size: PositiveInt
    image_size: PositiveInt
    projection_dim: PositiveInt


class ReferenceConfig(_Part):
    type: Literal["pi05", "pi0"]
    source: str = ""
    text: TextConfig
    expert: ExpertConfig
    vision: VisionConfig
    chunk_size: PositiveInt
    max_action_dim: PositiveInt
    max_state_dim: PositiveInt = 32  # read by pi0
    num_inference_steps: PositiveInt
    num_cameras: PositiveInt

    @model_validator(mode="after")
    def _towers_fit(self):
        for key in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = self.expert.model_dump()[key], self.text.model_dump()[key]
            if ours != theirs:
                raise ValueError(f"expert.{key} is {ours} and text.{key} {theirs}; both attend in one softmax")
        if self.expert.adarms != (self.type == "pi05"):
            raise ValueError(f"expert.adarms is {self.expert.adarms}, and type {self.type}; pi05 has it, pi0 has not")
        if self.text.num_heads % self.text.num_kv_heads or self.text.head_dim % 2:
            raise ValueError("num_heads has to be a multiple of num_kv_heads, and head_dim even")
        if self.expert.width % 2:
            raise ValueError(f"expert.width is {self.expert.width}; it has to be even: sines and cosines")
        if self.vision.hidden_size % self.vision.num_attention_heads:
            raise ValueError(f"vision.hidden_size does not divide into {self.vision.num_attention_heads} heads")
        if self.vision.image_size < self.vision.patch_size:
            raise ValueError(f"vision.image_size is {self.vision.image_size}, less than one patch")
        if self.vision.projection_dim != self.text.width:
            raise ValueError(f"vision.projection_dim is {self.vision.projection_dim} and text.width {self.text.width}")
        return self


class Errors(NamedTuple):
    """Largest absolute differences."""

    velocity: float  # of |target - velocity|, which is what a loss per element tells of a velocity
    loss: float
    sampled: float


class Reference(NamedTuple):
    observation: Observation  # but for its images, which came normalised: ``pixels``
    pixels: Tensor  # [B, C, 3, P, P]
    actions: Tensor
    noise: Tensor
    time: Tensor
    x_t: Tensor
    loss: Tensor
    sampled: Tensor


@torch.no_grad()
def measure(folder: Path) -> Errors:
    """UsageError where the folder does not hold such a reference."""
    config = _load_config(folder / CONFIG_NAME)
    reference = _load_io(folder / IO_NAME, config)
    paligemma = build_paligemma(_vlm_config(config), Builder()).eval()
    expert = PiJointExpert(_dimensions(config), config.max_state_dim, config.max_action_dim).eval()
    load_pi_weights(folder / WEIGHTS_NAME, paligemma, expert, Builder())

    prefix = encode_with_layers(paligemma, reference.observation, reference.pixels, checkpointing=False)
    actions, noise, time = reference.actions[:, None], reference.noise[:, None], reference.time[:, None]
    state, everywhere = reference.observation.state, torch.ones(actions.shape[0], config.chunk_size, dtype=torch.bool)
    x_t, indicator = noisy_action(actions, noise, time), torch.zeros_like(time, dtype=torch.long)
    velocity = expert(expert.encode_prefix(prefix), state, x_t, time, indicator, everywhere)
    deviation = (target_velocity(actions, noise) - velocity)[:, 0]
    dims = torch.ones(actions.shape[0], config.max_action_dim, dtype=torch.bool)
    steps = config.num_inference_steps
    sampled = sample_actions(expert, prefix, state, reference.noise, dims, None, 1.0, steps)
    _check_interpolant(x_t[:, 0], reference.x_t, folder)
    return Errors(
        _largest(deviation.abs() - reference.loss.sqrt()),
        _largest(deviation.square() - reference.loss),
        _largest(sampled - reference.sampled),
    )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _check_interpolant(ours: Tensor, theirs: Tensor, folder: Path) -> None:
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise UsageError(f"{folder / IO_NAME}: x_t is not time * noise + (1 - time) * actions")


def _load_config(path: Path) -> ReferenceConfig:
    try:
        return ReferenceConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error})") from None


def _dimensions(config: ReferenceConfig) -> PiDimensions:
    expert = config.expert
    return PiDimensions(
        version=config.type,
        width=expert.width,
        mlp_width=expert.mlp_dim,
        num_layers=expert.depth,
        num_heads=expert.num_heads,
        num_kv_heads=expert.num_kv_heads,
        head_dim=expert.head_dim,
        rope_theta=10_000.0,
    )


def _vlm_config(config: ReferenceConfig):
    from transformers import PaliGemmaConfig

    text, vision = config.text, config.vision
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "hidden_size": text.width,
            "intermediate_size": text.mlp_dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            **{key: min(value, text.vocab_size - 1) for key, value in special.items()},
        },
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision.model_dump()},
        projection_dim=vision.projection_dim,
        image_token_index=text.vocab_size - 1,
    )


def _load_io(path: Path, config: ReferenceConfig) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    batch_size = len(arrays["time"]) if arrays.get("time", np.zeros(())).ndim else 0

    def take(name: str, *shape: int | None, integer: bool = False) -> Tensor:
        """``shape``: None = any size."""
        if name not in arrays:
            raise UsageError(f"{path}: has no '{name}'")
        array = arrays[name]
        if len(array.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
            expected = [n or "any" for n in shape]
            raise UsageError(f"{path}: '{name}' has shape {list(array.shape)}; config.json makes that {expected}")
        if array.dtype.kind not in "biuf" or (integer and array.dtype.kind == "f"):
            raise UsageError(f"{path}: '{name}' holds {array.dtype}, not {'whole ' if integer else ''}numbers")
        return torch.from_numpy(array.astype(np.int64 if integer else np.float32))

    side, cameras = config.vision.image_size, range(config.num_cameras)
    chunk = (batch_size, config.chunk_size, config.max_action_dim)
    time = take("time", batch_size)
    if not batch_size:
        raise UsageError(f"{path}: 'time' holds no samples")
    tokens = take("tokens", batch_size, None, integer=True)
    if not 0 <= tokens.min() <= tokens.max() < config.text.vocab_size:
        raise UsageError(f"{path}: 'tokens' go up to {tokens.max()}; config.json has {config.text.vocab_size} words")
    state = take("state", batch_size, config.max_state_dim) if config.type == "pi0" else torch.zeros(batch_size, 0)
    pixels = torch.stack([take(f"image{i}", batch_size, 3, side, side) for i in cameras], dim=1)
    observation = Observation(
        images=pixels,
        camera_mask=torch.stack([take(f"image_mask{i}", batch_size) for i in cameras], dim=1) > 0,
        tokens=tokens,
        token_mask=take("token_mask", batch_size, tokens.shape[1]) > 0,
        state=state,
    )
    names = ("x_t", "loss", "sampled")
    actions, noise = take("actions", *chunk), take("noise", *chunk)
    return Reference(observation, pixels, actions, noise, time, *(take(name, *chunk) for name in names))
