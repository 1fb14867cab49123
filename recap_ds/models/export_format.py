"""The export: a folder that holds a trained policy and everything needed to use it, without DeepSpeed.

    export.json                  what this is, where it came from, and every file's size and sha256; written last
    README.md                    a model card
    config.yaml contract.json    the recipe; what policy and robot agree on
    action_expert.safetensors    names inside the module
    critic.safetensors target_critic.safetensors    absent where the stage has none or they were left out
    vlm/                         a plain transformers PaliGemma folder
    adapter/                     peft's own format, where there are LoRA matrices that were not merged
    tokenizer/                   where the VLM has one; the tiny VLM reads bytes
    published.json unread.safetensors    of weights that others published (``recap_ds/weights``): in what form they
                                 were, and those of their tensors that nothing here reads

What they are is here; ``export_write.py`` writes them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from recap_ds import __version__
from recap_ds.config import LoraConfig, PiStarRECAPConfig
from recap_ds.files.records import CheckedRecord, FileRecord
from recap_ds.files.tensors import TensorSource
from recap_ds.models.lora import ADAPTER, base_name, is_adapter, merge_adapters
from recap_ds.processing.contract import RobotContract

EXPORT_NAME = "export.json"
CONFIG_NAME = "config.yaml"
VLM_NAME = "vlm"
VLM_CONFIG_NAME = "config.json"
VLM_WEIGHTS_NAME = "model.safetensors"
VLM_INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_NAME = "tokenizer"
PUBLISHED_NAME, UNREAD_NAME = "published.json", "unread.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Modules with a file of their own, beside the VLM.
HEADS = ("action_expert", "critic", "target_critic")
# Those that may be left out of an export of stage joint.
CRITICS = ("critic", "target_critic")
DEFAULT_MAX_SHARD_BYTES = 5 * 2**30

Sources = Mapping[str, TensorSource]
WeightsName = Literal["ema", "raw"]
DtypeName = Literal["float32", "bfloat16"]


class Provenance(BaseModel):
    """Where the weights came from; None where that is not known (a policy saved from plain PyTorch)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str | None = None
    step: int | None = None
    weights: WeightsName | None = None
    format: Literal["recap_ds", "deepspeed"] | None = None  # of the checkpoint's files
    world: int | None = None  # ranks that wrote it
    imported_from: str | None = None  # whose published weights they are: a folder or hub id
    # Of its state.json, which has the checksum of every other file; DeepSpeed's own has none.
    checkpoint_sha256: str | None = None


class Results(NamedTuple):
    """What the run measured on held-out episodes."""

    step: int
    figures: Mapping[str, float | None]


class ExportRecord(CheckedRecord):
    """``export.json``."""

    FILE_NAME = EXPORT_NAME
    MEANING = "an export's record"
    FORMAT_VERSION = 1

    recap_ds_version: str = __version__
    provenance: Provenance
    dtype: DtypeName
    adapter: Literal["none", "separate", "merged"]
    heads: tuple[str, ...]
    # False = transformers cannot load vlm/: it has the convolutional stem, which is ours; absent without a VLM.
    vlm_is_plain_transformers: bool | None
    config_sha256: str
    manifest_hash: str | None
    files: dict[str, FileRecord]

    def content_hash(self) -> str:
        """Of everything the export holds, wherever it lies."""
        files = {name: record.sha256 for name, record in self.files.items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ExportContents:
    """What goes into an export; a tensor is read only when its turn comes."""

    config: PiStarRECAPConfig
    contract: RobotContract | None
    provenance: Provenance
    dtype: DtypeName
    vlm: Sources  # ``names_in_files`` of the network's, without adapters; empty in an adapter-only export
    vlm_config: dict[str, Any]  # of vlm/config.json
    adapter: Sources  # names inside the network
    heads: Mapping[str, Sources]  # module -> names inside it
    adapter_is_merged: bool = False
    tokenizer_files: Sequence[Path] = field(default_factory=tuple)
    results: Results | None = None  # for the model card
    published: Mapping[str, Any] | None = None  # JSON; with it ``unread``, in the dtypes they have
    unread: Sources = field(default_factory=dict)


def stored_name(name: str) -> str:
    """How transformers spells a name inside PaliGemmaModel in its checkpoints (every version reads this spelling)."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def vlm_config_json(vlm_config: Any) -> dict[str, Any]:
    """``config.json`` of a VLM's configuration, as its ...ForConditionalGeneration.save_pretrained writes it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    return {**vlm_config.to_diff_dict(), "architectures": [CLASSES[vlm_config.model_type]]}


def merged(base: Sources, adapter: Sources, lora: LoraConfig) -> dict[str, TensorSource]:
    """``base`` with the adapter folded in, one matrix at a time."""

    def fold(stem: str) -> Iterator[torch.Tensor]:
        pair = [f"{stem}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
        layer = {f"{stem}.base_layer.weight": base[f"{stem}.weight"].read().float()}
        layer |= {name: adapter[name].read() for name in pair}
        yield dict(merge_adapters(layer, lora))[f"{stem}.weight"].view(-1)

    stems = {name.split(".lora_")[0] for name in adapter}
    folded = {f"{stem}.weight": base[f"{stem}.weight"]._replace(pieces=partial(fold, stem)) for stem in stems}
    return {**base, **folded}


def head_file(head: str) -> str:
    return f"{head}.safetensors"


def split_adapter(sources: Sources) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
    """(base, adapter) of tensors under their names in an adapted PaliGemmaModel; base names lose peft's wrapping."""
    base = {base_name(name): source for name, source in sources.items() if not is_adapter(name)}
    return base, {name: source for name, source in sources.items() if is_adapter(name)}


def tokenizer_files(folder: Path) -> list[Path]:
    """Of a VLM's folder; that of an export has them beside it."""
    beside = folder.parent / TOKENIZER_NAME
    where = beside if folder.name == VLM_NAME and beside.is_dir() else folder
    return [where / name for name in TOKENIZER_FILES if (where / name).is_file()]
