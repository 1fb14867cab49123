"""Any image-text-to-text architecture of transformers, as far as a critic can see through it.

What is asked of one: ``get_image_features`` takes pixels [N, 3, S, S] alone and gives the same number of tokens for
every image, and a ``language_model`` with ``layers`` reads embeddings. Whether that holds is found out by a rehearsal
on PyTorch's meta device, which costs neither memory nor computation. There nothing can look at a value, so that what
passes runs without a device sync, and on every rank in the same order; what does not pass is refused in one line.

    N images   S image side   T image tokens   D language model width
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recap_ds.config import VlmSource
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.vlm_weights import model_name

# In the config.json of what we write: the pixel statistics, which transformers keeps in another file.
PIXELS_KEY = "recap_ds_pixels"
PIXEL_FILES = ("preprocessor_config.json", "processor_config.json")
WHAT_WOULD_DO = "PaliGemma, Gemma 3, LLaVA (1.5), InternVL, Aya Vision or Command A Vision would do"


class Rehearsal(NamedTuple):
    """What the meta device says of an architecture."""

    network: nn.Module  # the base model on the meta device
    width: int
    unreached: frozenset[str]  # parameters that no output depends on

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.network.named_parameters()}


def load_architecture(folder: Path, source: VlmSource, image_size: int) -> Any:
    """The configuration of a folder, with its pixel statistics, checked against ``model.image_size``."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise UsageError(f"{source.key}: {folder} has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UsageError(f"{source.key}: {folder}/config.json cannot be read ({reason})") from None
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or "vision_config" not in config.sub_configs:
        raise UsageError(
            f"{source.key}: {folder} holds a {config.model_type}, no image-text-to-text model; {WHAT_WOULD_DO}"
        )
    _check_image_size(config.vision_config.to_dict().get("image_size"), image_size, folder)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            _settle(part)
    setattr(config, PIXELS_KEY, _pixel_statistics(folder, source))
    return config


def _check_image_size(sees: Any, image_size: int, folder: Path) -> None:
    sides = set(sees) if isinstance(sees, list | tuple) else {sees}
    if sides - {None, image_size}:
        side = "x".join(map(str, sees)) if len(sides) > 1 else max(sides)
        raise UsageError(f"model.image_size: {image_size}, but {folder} sees {side} px; set it to that")


def _settle(part: Any) -> None:
    """One dtype, the builder's, for all parts; and no dropout, as everywhere here."""
    part.dtype = None
    for key, value in part.to_dict().items():
        if ("dropout" in key or key == "drop_path_rate") and isinstance(value, float):
            setattr(part, key, 0.0)


def _pixel_statistics(folder: Path, source: VlmSource) -> dict[str, list[float]]:
    """Mean and standard deviation of the channels, of pixels in [0, 1]."""
    values = _read_json(folder / "config.json", source).get(PIXELS_KEY)
    for name in PIXEL_FILES:
        if values is None and (folder / name).is_file():
            values = _read_json(folder / name, source)
            values = values.get("image_processor", values)
            if not values.get("do_normalize", True):
                values = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    try:
        statistics = {key: [float(number) for number in values[key]] for key in ("image_mean", "image_std")}
    except (KeyError, TypeError, ValueError):
        statistics = {}
    if {len(numbers) for numbers in statistics.values()} != {3} or min(statistics["image_std"]) <= 0:
        raise UsageError(f"{source.key}: {folder} has no {PIXEL_FILES[0]} with image_mean and image_std")
    return statistics


def _read_json(path: Path, source: VlmSource) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source.key}: {path} cannot be read ({error})") from None


def image_features(network: nn.Module, pixels: Tensor) -> Tensor:
    """[N, T, D] of the architecture's own image path: vision tower, pooling and projection."""
    features = network.get_image_features(pixel_values=pixels).pooler_output
    return features if isinstance(features, Tensor) else torch.stack(tuple(features))


def attention_masks(config: Any, visible: Tensor, is_image: Tensor) -> Tensor | dict[str, Tensor]:
    """What the language model may attend to, bool [B, 1, T, T], as the architecture was trained on a prompt.

    PaliGemma reads its prefix in both directions, Gemma 3 its images; all others, and Gemma 3's words, look back only.
    ``visible`` [B, T], True = a real token; ``is_image`` [T]. By layer type where the architecture has several.
    """
    text = config.get_text_config().to_dict()
    position = visible.long().cumsum(dim=1)
    back = position[:, :, None] - position[:, None, :]  # how far a query [B, T, T] looks back
    order = torch.arange(visible.shape[1], device=visible.device)
    allowed = (order[:, None] >= order[None, :])[None]
    if config.model_type == "paligemma" or text.get("use_bidirectional_attention"):
        allowed, back = torch.ones_like(allowed), back.abs()
    elif config.model_type in ("gemma3", "shieldgemma2"):
        allowed = allowed | (is_image[:, None] & is_image[None, :])
    # Every token sees itself: attention over nothing is NaN, and NaN spreads.
    itself = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    full = ((visible[:, None, :] & allowed) | itself)[:, None]
    window = text.get("sliding_window")
    if window is None:
        near = full
    else:
        near = full & (back < window)[:, None]
    layer_types = text.get("layer_types")
    if layer_types is None:
        return near
    masks = {"full_attention": full, "sliding_attention": near}
    return {kind: masks[kind] for kind in set(layer_types)}


def rehearse(config: Any, source: VlmSource, image_size: int) -> Rehearsal:
    """Two images and three words forward and backward on the meta device. UsageError where that cannot be."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    what = f"{source.key}: a {config.model_type}"
    try:
        with torch.device("meta"), no_init_weights():
            network = AutoModel.from_config(config)
            features = image_features(network, torch.zeros(2, 3, image_size, image_size))
            assert features.dim() == 3 and len(features) == 2, f"gives image features {list(features.shape)}"
    except Exception as error:  # transformers' models fail in as many ways as there are models
        raise UsageError(
            f"{what} cannot be asked for image features of pixels alone ({_first_line(error)}); {WHAT_WOULD_DO}"
        ) from None
    try:
        hidden = _rehearse_words(network, config, features)
    except Exception as error:
        raise UsageError(
            f"{what} has no language model that reads embeddings ({_first_line(error)}); {WHAT_WOULD_DO}"
        ) from None
    if any(True for _ in network.parameters(recurse=False)) or len(network.state_dict()) > len(_names(network)):
        raise UsageError(f"{what} keeps weights outside of its layers, which cannot be sharded; {WHAT_WOULD_DO}")
    reached = torch.autograd.grad(hidden.sum(), list(network.parameters()), allow_unused=True)
    unreached = frozenset(name for name, grad in zip(_names(network), reached, strict=True) if grad is None)
    return Rehearsal(network, hidden.shape[-1], unreached)


def _rehearse_words(network: nn.Module, config: Any, features: Tensor) -> Tensor:
    with torch.device("meta"):
        words = network.get_input_embeddings()(torch.zeros(2, 3, dtype=torch.long))
        embeddings = torch.cat([features, words], dim=1)
        visible = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        masks = attention_masks(config, visible, torch.ones(visible.shape[1], dtype=torch.bool))
    assert len(network.language_model.layers) > 0
    return network.language_model(
        inputs_embeds=embeddings, attention_mask=masks, position_ids=visible.long(), use_cache=False
    ).last_hidden_state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:120]


def _names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def stored_name_reader(config: Any) -> Callable[[str], str | None]:
    """Name inside the base model of a tensor in a checkpoint, by transformers' own table of old spellings.

    None for what the model has no use for: language heads above all, since nothing here predicts text.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        whole = AutoModelForImageTextToText.from_config(config)
    transforms = get_model_conversion_mapping(whole)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, known = whole.base_model_prefix, whole.state_dict()

    def read(stored: str) -> str | None:
        name, converted = rename_source_key(stored, renamings, converters, prefix, known)
        if converted is not None:
            raise ValueError(f"tensor '{stored}' is stored in another form than the model's own")
        inside = name.removeprefix(f"{prefix}.")
        return None if inside == name and name in known else model_name(inside)

    return read


def random_values(rehearsal: Rehearsal, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial values keyed by (seed, parameter name): matrices fan-in normal, the rest as the architecture has it."""
    for module_name, module in rehearsal.network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{module_name}.{leaf}", parameter.shape
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "little", signed=True))
                if len(shape) > 1:
                    fan_in = shape[-1] if isinstance(module, nn.Embedding) else shape[1:].numel()
                    yield name, torch.randn(shape) * fan_in**-0.5
                else:
                    yield name, _as_constructed(rehearsal.network, module_name, module, leaf)


def _as_constructed(network: nn.Module, module_name: str, module: nn.Module, leaf: str) -> Tensor:
    twin = copy.copy(module)
    twin._parameters = {
        name: nn.Parameter(torch.empty(p.shape)) for name, p in module._parameters.items() if p is not None
    }
    twin._parameters |= {name: None for name, p in module._parameters.items() if p is None}
    with torch.no_grad():
        _owner(network, module_name)._init_weights(twin)
    return twin._parameters[leaf].detach()


def _owner(network: nn.Module, module_name: str) -> nn.Module:
    """The innermost of transformers' models around a module: its class knows how the module is initialised."""
    from transformers import PreTrainedModel

    parts = module_name.split(".")
    around = (network.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), 0, -1))
    return next((module for module in around if isinstance(module, PreTrainedModel)), network)


def restore_tables(network: nn.Module) -> None:
    """Every float buffer (rotary frequencies, scales) as plain PyTorch computes it: zero.Init rounded them."""
    for parameter in network.parameters():
        parameter._is_hf_initialized = True  # transformers leaves these alone
    for module_name, module in list(network.named_modules()):
        floats = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
        if floats:
            module._buffers |= {name: torch.empty_like(b, dtype=torch.float32) for name, b in floats.items()}
            with torch.no_grad():
                _owner(network, module_name)._init_weights(module)


def with_unreached(
    values: Iterator[tuple[str, Tensor]], unreached: frozenset[str], network: nn.Module, builder: Builder
) -> Iterator[tuple[str, Tensor]]:
    """``values``, then zeros for the parameters that matter to nothing and were left out of a checkpoint or export."""
    seen = set()
    for name, value in values:
        seen.add(name)
        yield name, value
    parameters: Mapping[str, nn.Parameter] = dict(network.named_parameters())
    for name in sorted(unreached - seen):
        yield name, torch.zeros(builder.full_shape(parameters[name]))
