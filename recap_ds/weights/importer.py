"""``recap-ds weights import``: published weights -> an export, which ``training.start_from`` takes.

Every tensor is accounted for: it has a place of its shape in the model that the export describes, or it is one that
nothing here reads, which is kept beside. Values pass through a piece of one tensor at a time.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.files.records import write_text
from recap_ds.files.tensors import DTYPE_NAMES, TensorSource
from recap_ds.models.building import MetaBuilder
from recap_ds.models.export_format import (
    VLM_CONFIG_NAME,
    ExportContents,
    ExportRecord,
    Provenance,
    Sources,
    tokenizer_files,
    vlm_config_json,
)
from recap_ds.models.export_write import check_out, write_export
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.vlm import TINY
from recap_ds.models.vlm_weights import load_vlm_config
from recap_ds.recipe import parse_config
from recap_ds.weights.architecture import PiArchitecture
from recap_ds.weights.names import EMBEDDING, UNPUBLISHED
from recap_ds.weights.source import Published, open_published, pi_architecture

# What a weight may be stored as: each is one of what an export holds, or becomes float32 without loss.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PALIGEMMA = "google/paligemma-3b-pt-224"  # whose tokenizer pi0 and pi0.5 read by


GROUPS = (
    "vision tower",
    "projector",
    "token embedding",
    "language model",
    "action expert",
    "projections of actions, state and time",
    "the embedding again, as a head over words",
    "not read here, kept beside",
)


class Group(NamedTuple):
    """A line of the account."""

    what: str
    num_tensors: int
    num_parameters: int
    dtypes: tuple[str, ...]


class Imported(NamedTuple):
    kind: str
    form: str
    record: ExportRecord
    groups: list[Group]


def import_weights(path: str, out: Path, overrides: Sequence[str] = (), *, overwrite: bool = False) -> Imported:
    """``path``: a folder, a file or a hub id. ``overrides`` (section.key=value) go into the export's recipe.

    UsageError where a tensor is missing, has no place or another shape.
    """
    check_out(out, overwrite)
    published = open_published(path)
    if published.kind == "paligemma":
        config, vlm_config = _paligemma(published, path, overrides)
    else:
        architecture = pi_architecture(published)
        config, vlm_config = _pi_config(architecture, published, overrides), architecture.vlm_config()
    vlm_json = vlm_config_json(vlm_config)
    vlm, expert = _placed(published, _expected(config, vlm_json, published))
    unread, same = _unread(published, vlm)
    contents = ExportContents(
        config=config,
        contract=None,
        provenance=Provenance(imported_from=path),
        dtype="bfloat16" if _dtypes(published) == {torch.bfloat16} else "float32",
        vlm=vlm,
        vlm_config=vlm_json,
        adapter={},
        heads={"action_expert": expert} if expert else {},
        tokenizer_files=_tokenizer_files(config, published),
        published=_origin(published, same),
        unread=unread,
    )
    record = write_export(out, contents, overwrite=overwrite)
    return Imported(published.kind, published.form, record, account(published, same))


def _tokenizer_files(config: PiStarRECAPConfig, published: Published) -> Sequence[Path]:
    """Of the folder that the recipe names, or of the weights' own; a hub id's are fetched when they are needed."""
    name = config.model.vlm_model_name
    if name == TINY:
        return ()
    named = Path(name).expanduser()
    return tokenizer_files(named if named.is_dir() else published.folder)


def _dtypes(published: Published) -> set[torch.dtype]:
    """Of what the model reads."""
    names = published.names
    return {published.tensors[name].dtype for name in (*names.vlm.values(), *names.expert.values())}


def _checked(config: PiStarRECAPConfig) -> PiStarRECAPConfig:
    for key, wrong in (
        ("training.stage: is policy for what holds no critic", config.training.stage != "policy"),
        ("lora.enabled: adapters are for training on the export", config.lora.enabled),
    ):
        if wrong:
            raise UsageError(f"{key}; leave it out")
    return config


def _pi_config(architecture: PiArchitecture, published: Published, overrides: Sequence[str]) -> PiStarRECAPConfig:
    is_pi05, expert, side = architecture.type == "pi05", architecture.expert, architecture.vision.image_size
    values: dict[str, Any] = {
        "name": architecture.type,
        "chunk_size": architecture.chunk_size,
        "max_action_dim": architecture.max_action_dim,
        "max_state_dim": architecture.max_state_dim,
        "num_inference_steps": architecture.num_inference_steps,
        "model": {
            "vlm_model_name": PALIGEMMA,
            "image_size": side,
            "max_prompt_tokens": published.settings.get("tokenizer_max_length", 200 if is_pi05 else 48),
            "action_expert": "pi_joint",
            "pi_version": architecture.type,
            "action_expert_hidden_size": expert.width,
            "action_expert_num_layers": expert.depth,
            "action_expert_num_heads": expert.num_heads,
            "action_expert_mlp_ratio": expert.mlp_dim / expert.width,
        },
        "training": {"stage": "policy"},
        "recap": {"sft": True},
        "data": {"normalization": "quantile", "prompt_format": "pi05"} if is_pi05 else {"normalization": "mean_std"},
    }
    config = _checked(parse_config(values, overrides, str(published.folder / "config.json")))
    if config.model.image_size != side:
        raise UsageError(f"model.image_size: {config.model.image_size}, but this VLM sees {side} px; leave it out")
    return config


def _paligemma(published: Published, path: str, overrides: Sequence[str]) -> tuple[PiStarRECAPConfig, Any]:
    vision = published.settings.get("vision_config")
    image_size = vision.get("image_size", 224) if isinstance(vision, dict) else 224
    vlm_config = load_vlm_config(published.folder, image_size)
    values = {
        "name": "paligemma",
        "model": {"vlm_model_name": path, "image_size": image_size},
        "training": {"stage": "policy"},
        "recap": {"sft": True},
    }
    return _checked(parse_config(values, overrides, str(published.folder))), vlm_config


def _expected(
    config: PiStarRECAPConfig, vlm_json: Mapping[str, Any], published: Published
) -> dict[str, dict[str, torch.Size]]:
    """Shapes by name inside the modules ``vlm`` and ``action_expert`` that training would build from this export."""
    builder = MetaBuilder(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / VLM_CONFIG_NAME, json.dumps(vlm_json))
        with builder.context():
            policy = PiStarRECAPPolicy(config, builder, vlm_folder=folder)
    modules = {"vlm": policy.vlm.network, "action_expert": policy.action_expert}
    if published.kind == "paligemma":
        del modules["action_expert"]
    return {part: {name: p.shape for name, p in module.named_parameters()} for part, module in modules.items()}


def _placed(
    published: Published, expected: Mapping[str, Mapping[str, torch.Size]]
) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
    """Sources of (VLM, expert) by name inside them; the indicator, which nobody publishes, begins at zero."""
    found = {"vlm": published.names.vlm, "action_expert": published.names.expert}
    placed: dict[str, dict[str, TensorSource]] = {"vlm": {}, "action_expert": {}}
    for part, shapes in expected.items():
        names = found[part]
        missing = [name for name in shapes if name not in names and name != UNPUBLISHED]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(f"{published.folder}: holds no tensor for '{missing[0]}'{more} of the {_words(part)}")
        for name, shape in shapes.items():
            if name == UNPUBLISHED:
                placed[part][name] = TensorSource.of(torch.zeros(shape))
            else:
                placed[part][name] = _weight(published, names[name], tuple(shape))
    homeless = [name for part, names in found.items() for place, name in names.items() if place not in placed[part]]
    if homeless:
        more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
        raise UsageError(f"{published.folder}: '{homeless[0]}'{more} has no place in a {published.kind} model")
    return placed["vlm"], placed["action_expert"]


def _weight(published: Published, name: str, expected: tuple[int, ...]) -> TensorSource:
    stored = published.tensors[name]
    if stored.shape != expected:
        raise UsageError(f"{published.folder}: '{name}' is {list(stored.shape)}, the model needs {list(expected)}")
    if stored.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"{published.folder}: '{name}' is {DTYPE_NAMES[stored.dtype]}; weights are F32, BF16 or F16 here"
        )
    return published.sources[name]


def _words(part: str) -> str:
    return {"vlm": "VLM", "action_expert": "action expert"}[part]


def _unread(published: Published, vlm: Sources) -> tuple[dict[str, TensorSource], list[str]]:
    """Tensors to keep as they are, and names of those that are the embedding again, bit for bit."""
    kept, same = {}, []
    for bare, name in published.names.unread.items():
        source = published.sources[name]
        if bare.endswith("lm_head.weight") and _equal(source, vlm[EMBEDDING]):
            same.append(bare)
        else:
            kept[bare] = source
    return kept, same


def _equal(first: TensorSource, second: TensorSource) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return all(torch.equal(a, b) for a, b in zip(first.pieces(), second.pieces(), strict=True))


def _origin(published: Published, same: list[str]) -> dict[str, Any]:
    """``published.json``: what ``weights export`` needs to give the same file back."""
    names, tensors = published.names, published.tensors
    stored = [*names.vlm.values(), *names.expert.values()]
    return {
        "type": published.kind,
        "form": published.form,
        "config": published.settings,
        "dtypes": {name: DTYPE_NAMES[tensors[name].dtype] for name in sorted(stored)},
        "same_as_embedding": same,
    }


def account(published: Published, same: Sequence[str] = ()) -> list[Group]:
    """Every tensor of the file, in ``GROUPS``."""
    groups: dict[str, list[str]] = {what: [] for what in GROUPS}
    vision, projector, embedding, words, expert, projections, again, unread = groups.values()
    towers = {"vision_tower": vision, "multi_modal_projector": projector, "language_model": words}
    for place, name in published.names.vlm.items():
        (embedding if place == EMBEDDING else towers[place.split(".")[0]]).append(name)
    for place, name in published.names.expert.items():
        (expert if place.startswith(("layers.", "norm.")) else projections).append(name)
    for bare, name in published.names.unread.items():
        (again if bare in same else unread).append(name)
    return [_group(what, [published.tensors[name] for name in names]) for what, names in groups.items() if names]


def _group(what: str, tensors: Sequence[Any]) -> Group:
    dtypes = tuple(sorted({DTYPE_NAMES[tensor.dtype] for tensor in tensors}))
    return Group(what, len(tensors), sum(torch.Size(tensor.shape).numel() for tensor in tensors), dtypes)
