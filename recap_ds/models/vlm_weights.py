"""Where the VLM's tensors come from: a checkpoint folder, or a seed.

Both yield ``(name inside PaliGemmaModel, tensor)`` one at a time, so that a sharded model of any size is filled without
holding more than one tensor, with values that depend on neither world size nor construction order. A tensor of a folder
is still in its file: whoever keeps a part of it reads that part.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from recap_ds.config import VlmSource
from recap_ds.errors import UsageError
from recap_ds.files.tensor_reader import FileTensor, TensorFileReader
from recap_ds.models.building import Builder

# transformers has spelled PaliGemma's modules in several ways; all of them are read.
_RENAMES = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
# The language head is tied to the token embedding and nothing here predicts text; SigLIP's pooling head is unused.
_IGNORED = re.compile(r"(^|\.)lm_head\.|^vision_tower\.head\.|\.position_ids$|\.inv_freq$")


def locate_vlm(source: VlmSource) -> Path | None:
    """Folder with config.json and safetensors; None for the tiny preset. Downloads a hub id once, into its cache."""
    if source.name == "tiny":
        return None
    folder = Path(source.name).expanduser()
    if folder.is_dir():
        return folder
    if source.name.startswith((".", "/", "~")):
        raise UsageError(f"{source.key}: there is no folder {source.name}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt"] + ([] if source.random_init else ["*.safetensors"])
    try:
        return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each becomes the same advice
        reason = str(error).split("\n")[0][:160]
        raise UsageError(
            f"{source.key}: '{source.name}' is no folder and not to be had from the hub ({reason}); "
            "accept the model's licence and log in (hf auth login), or name a local folder"
        ) from None


def load_vlm_config(folder: Path, image_size: int):
    """PaliGemmaConfig of a folder, checked against ``model.image_size``."""
    from transformers import AutoConfig, PaliGemmaConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"model.vlm_model_name: {folder} has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UsageError(f"model.vlm_model_name: {folder}/config.json cannot be read ({reason})") from None
    if not isinstance(config, PaliGemmaConfig):
        raise UsageError(f"model.vlm_model_name: {folder} holds a {config.model_type}, not a paligemma")
    if config.vision_config.image_size != image_size:
        raise UsageError(
            f"model.image_size: {image_size}, but {folder} sees {config.vision_config.image_size} px; set it to that"
        )
    config.vision_config.vision_use_head = False
    # A dtype written beside a tower would be obeyed for that tower alone; the builder's holds for all.
    for part in (config, config.text_config, config.vision_config):
        part.dtype = None
    return config


def checkpoint_tensors(
    folder: Path, read_name: Callable[[str], str | None] | None = None
) -> Iterator[tuple[str, FileTensor]]:
    """Every model tensor of a folder's safetensors files, none of them read yet.

    ``read_name`` is ``model_name``, PaliGemma's, unless another architecture brings its own.
    """
    for file in weight_files(folder):
        try:
            reader = TensorFileReader(file)
        except UsageError as error:
            raise UsageError(f"model.vlm_model_name: {error}; copy it again") from None
        for stored in reader.tensors:
            name = (read_name or model_name)(stored)
            if name is not None:
                yield name, reader.tensor(stored)


def model_name(stored: str) -> str | None:
    """Name inside PaliGemmaModel of a tensor in a checkpoint; None for one the model has no use for."""
    for pattern, replacement in _RENAMES:
        stored = pattern.sub(replacement, stored)
    return None if _IGNORED.search(stored) else stored


def weight_files(folder: Path, key: str = "model.vlm_model_name") -> list[Path]:
    """The safetensors files that make up a checkpoint: those of its index, or model.safetensors, or all there are.

    ``key``: what named the folder, for the message.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{key}: {index} is no index of safetensors files; copy it again") from None
    else:
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise UsageError(f"{key}: {folder} lacks {absent[0] if absent else 'any .safetensors file'}")
    return files


def random_tensors(paligemma: nn.Module, builder: Builder, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial values keyed by (seed, parameter name): fan-in normal weights, zero biases, identity norms."""
    for module_name, module in paligemma.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            shape = builder.full_shape(parameter)
            if leaf == "bias":
                yield name, torch.zeros(shape)
            elif isinstance(module, nn.LayerNorm):
                yield name, torch.ones(shape)
            elif len(shape) == 1:  # Gemma's RMSNorm multiplies by 1 + weight
                yield name, torch.zeros(shape)
            else:
                yield name, _normal(shape, _std(module, shape), f"{seed}/{name}")


def _std(module: nn.Module, shape: torch.Size) -> float:
    # Embeddings: 1 / sqrt(width), which transformers multiplies by sqrt(width) for Gemma's tokens.
    fan_in = shape[-1] if isinstance(module, nn.Embedding) else math.prod(shape[1:])
    return fan_in**-0.5


def _normal(shape: torch.Size, std: float, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
