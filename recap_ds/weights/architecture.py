"""Sizes of a pi0 / pi0.5 model: as a config.json spells them out, or as its tensors' shapes tell.

Shapes tell everything but how many heads share a projection: published models have 8, their vision tower 16.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from recap_ds.errors import UsageError
from recap_ds.models.pi_joint import PiDimensions
from recap_ds.weights.names import EMBEDDING

NUM_HEADS, NUM_VISION_HEADS = 8, 16
Shapes = Mapping[str, tuple[int, ...]]


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


class PiArchitecture(_Part):
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

    @property
    def dimensions(self) -> PiDimensions:
        expert = self.expert
        return PiDimensions(
            version=self.type,
            width=expert.width,
            mlp_width=expert.mlp_dim,
            num_layers=expert.depth,
            num_heads=expert.num_heads,
            num_kv_heads=expert.num_kv_heads,
            head_dim=expert.head_dim,
            rope_theta=10_000.0,
        )

    def vlm_config(self):
        """transformers' configuration of the VLM."""
        from transformers import PaliGemmaConfig

        text, vision = self.text, self.vision
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


def read_json(path: Path) -> dict[str, Any]:
    """UsageError where the file is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: is no JSON object")
    return values


def check_architecture(values: Mapping[str, Any], path: Path) -> PiArchitecture:
    """``path``: the file they are from, for the message."""
    try:
        return PiArchitecture.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def sizes_of(vlm: Shapes, expert: Shapes) -> dict[str, dict[str, int | bool]]:
    """``text``, ``expert`` and ``vision`` of a ``PiArchitecture``, from shapes by name inside our modules.

    Shapes that contradict each other are found when the model they make is set beside them. UsageError where a tensor
    that tells a size is not there.
    """
    embedding = _shape(vlm, EMBEDDING, 2)
    patch = _shape(vlm, "vision_tower.embeddings.patch_embedding.weight", 4)
    positions = _shape(vlm, "vision_tower.embeddings.position_embedding.weight", 2)
    side = round(positions[0] ** 0.5)
    return {
        "text": {"vocab_size": embedding[0], **_tower(vlm, "language_model.layers")},
        "expert": {"adarms": "norm.dense.weight" in expert, **_tower(expert, "layers")},
        "vision": {
            "hidden_size": patch[0],
            "num_hidden_layers": _count(vlm, "vision_tower.encoder.layers"),
            "num_attention_heads": NUM_VISION_HEADS,
            "intermediate_size": _shape(vlm, "vision_tower.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "patch_size": patch[3],
            "image_size": side * patch[3],
            "projection_dim": _shape(vlm, "multi_modal_projector.linear.weight", 2)[0],
        },
    }


def _tower(shapes: Shapes, layers: str) -> dict[str, int]:
    mlp_dim, width = _shape(shapes, f"{layers}.0.mlp.gate_proj.weight", 2)
    queries, keys = (_shape(shapes, f"{layers}.0.self_attn.{name}_proj.weight", 2)[0] for name in "qk")
    head_dim = queries // NUM_HEADS
    if queries % NUM_HEADS or head_dim == 0 or keys % head_dim:
        raise UsageError(
            f"'{layers}.0.self_attn.q_proj.weight' has {queries} rows and k_proj {keys}: these are no {NUM_HEADS} heads"
        )
    return {
        "width": width,
        "depth": _count(shapes, layers),
        "mlp_dim": mlp_dim,
        "num_heads": NUM_HEADS,
        "num_kv_heads": keys // head_dim,
        "head_dim": head_dim,
    }


def _count(shapes: Shapes, layers: str) -> int:
    """How many layers there are; no number may be left out."""
    pattern = re.compile(rf"^{re.escape(layers)}\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    for expected, number in enumerate(sorted(numbers)):
        if number != expected:
            raise UsageError(f"holds no tensor of '{layers}.{expected}', but of layer {number}")
    return len(numbers)


def _shape(shapes: Shapes, name: str, num_dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UsageError(f"holds no tensor for '{name}'")
    if len(shapes[name]) != num_dims:
        raise UsageError(f"'{name}' has shape {list(shapes[name])}, not {num_dims} dims")
    return shapes[name]
