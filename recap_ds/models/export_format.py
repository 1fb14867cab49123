"""The export: a folder that holds a trained policy and everything needed to use it, without DeepSpeed.

    export.json                  what this is, where it came from, and every file's size and sha256; written last
    config.yaml contract.json    the recipe; what policy and robot agree on
    action_expert.safetensors    names inside the module
    critic.safetensors target_critic.safetensors    absent where the stage has none or they were left out
    vlm/                         a plain transformers PaliGemma folder
    adapter/                     peft's own format, where there are LoRA matrices that were not merged
    tokenizer/                   where the VLM has one; the tiny VLM reads bytes

Written as a stream (memory near one tensor) under an unfinished name, then renamed: never half an export.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from recap_ds import __version__
from recap_ds.config import LoraConfig, PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import (
    FileRecord,
    read_checked_json,
    record_file,
    sync_file,
    write_checked_json,
    write_text,
)
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.models.lora import ADAPTER, base_name, is_adapter, merge_adapters, peft_config, peft_name
from recap_ds.processing.contract import CONTRACT_NAME, RobotContract
from recap_ds.recipe import dump_config

FORMAT_VERSION = 1
EXPORT_NAME = "export.json"
CONFIG_NAME = "config.yaml"
VLM_NAME = "vlm"
VLM_CONFIG_NAME = "config.json"
VLM_WEIGHTS_NAME = "model.safetensors"
VLM_INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_NAME = "tokenizer"
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


class ExportRecord(BaseModel):
    """``export.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
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

    @classmethod
    def load(cls, folder: Path) -> "ExportRecord":
        path = folder / EXPORT_NAME
        try:
            return cls.model_validate(read_checked_json(path, FORMAT_VERSION))
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise UsageError(f"{path}: is not an export's record ('{place}')") from None

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

    def fold(stem: str) -> torch.Tensor:
        pair = [f"{stem}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
        layer = {f"{stem}.base_layer.weight": base[f"{stem}.weight"].read().float()}
        layer |= {name: adapter[name].read() for name in pair}
        return dict(merge_adapters(layer, lora))[f"{stem}.weight"]

    stems = {name.split(".lora_")[0] for name in adapter}
    folded = {f"{stem}.weight": base[f"{stem}.weight"]._replace(read=partial(fold, stem)) for stem in stems}
    return {**base, **folded}


def write_export(
    out: Path, contents: ExportContents, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, overwrite: bool = False
) -> ExportRecord:
    """Write ``out`` whole or not at all. Refuses a folder that is there unless it is an export and ``overwrite``."""
    check_out(out, overwrite)
    unfinished = out.with_name(f".{out.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    record = _write_files(unfinished, contents, max_shard_bytes)
    for name in record.files:
        sync_file(unfinished / name)
    write_checked_json(unfinished / EXPORT_NAME, record.model_dump(mode="json"))
    sync_folder(unfinished)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        os.replace(out, old)
    os.replace(unfinished, out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)
    return record


def check_out(out: Path, overwrite: bool) -> None:
    """UsageError where writing to ``out`` would destroy something that is not an older export."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if not out.exists():
        return
    if not (out / EXPORT_NAME).is_file():
        raise UsageError(f"OUT {out}: is there already and is no export; name a new folder")
    if not overwrite:
        raise UsageError(f"OUT {out}: holds an export; give --overwrite, or name another folder")


def _write_files(folder: Path, contents: ExportContents, max_shard_bytes: int) -> ExportRecord:
    files: dict[str, FileRecord] = {}
    config_text = dump_config(contents.config)
    files[CONFIG_NAME] = write_text(folder / CONFIG_NAME, config_text)
    if contents.contract is not None:
        contents.contract.save(folder)
        files[CONTRACT_NAME] = record_file(folder / CONTRACT_NAME)
    dtype = getattr(torch, contents.dtype)
    for head, sources in contents.heads.items():
        files[head_file(head)] = write_tensor_file(folder / head_file(head), _cast(sources, dtype))
    if contents.vlm:
        vlm_config = {**contents.vlm_config, "dtype": contents.dtype}
        sources = _cast({stored_name(name): source for name, source in contents.vlm.items()}, dtype)
        files |= _write_folder(folder, VLM_NAME, _write_vlm(folder / VLM_NAME, vlm_config, sources, max_shard_bytes))
    if contents.adapter:
        files |= _write_folder(folder, ADAPTER_NAME, _write_adapter(folder / ADAPTER_NAME, contents))
    if contents.tokenizer_files:
        copies = _copy_files(folder / TOKENIZER_NAME, contents.tokenizer_files)
        files |= _write_folder(folder, TOKENIZER_NAME, copies)
    return ExportRecord(
        provenance=contents.provenance,
        dtype=contents.dtype,
        adapter="merged" if contents.adapter_is_merged else "separate" if contents.adapter else "none",
        heads=tuple(contents.heads),
        vlm_is_plain_transformers=not contents.config.model.conv_stem if contents.vlm else None,
        config_sha256=files[CONFIG_NAME].sha256,
        manifest_hash=contents.contract.manifest_hash if contents.contract else None,
        files=files,
    )


def head_file(head: str) -> str:
    return f"{head}.safetensors"


def _cast(sources: Sources, dtype: torch.dtype) -> dict[str, TensorSource]:
    return {name: source.cast(dtype) for name, source in sources.items()}


def _write_folder(root: Path, name: str, written: Iterator[tuple[str, FileRecord]]) -> dict[str, FileRecord]:
    """Run a writer of files inside ``root/name`` and flush that folder."""
    (root / name).mkdir()
    files = {f"{name}/{file}": record for file, record in written}
    sync_folder(root / name)
    return files


def _write_vlm(
    folder: Path, vlm_config: Mapping[str, Any], sources: Sources, max_shard_bytes: int
) -> Iterator[tuple[str, FileRecord]]:
    yield VLM_CONFIG_NAME, write_text(folder / VLM_CONFIG_NAME, json.dumps(vlm_config, indent=2, sort_keys=True) + "\n")
    shards = split_shards(sources, max_shard_bytes)
    if len(shards) == 1:
        yield VLM_WEIGHTS_NAME, write_tensor_file(folder / VLM_WEIGHTS_NAME, sources)
        return
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        yield file, write_tensor_file(folder / file, {name: sources[name] for name in names})
    total = sum(source.num_bytes for source in sources.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    yield VLM_INDEX_NAME, write_text(folder / VLM_INDEX_NAME, index_text + "\n")


def split_shards(sources: Sources, max_shard_bytes: int) -> list[list[str]]:
    """Names in order, in runs of at most ``max_shard_bytes``; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, source in sources.items():
        if shards[-1] and used + source.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += source.num_bytes
    return shards


def _write_adapter(folder: Path, contents: ExportContents) -> Iterator[tuple[str, FileRecord]]:
    config = peft_config(contents.config.lora)
    config.base_model_name_or_path = contents.config.vlm_source.name
    config.inference_mode = True
    config.save_pretrained(folder)
    yield "adapter_config.json", record_file(folder / "adapter_config.json")
    sources = {peft_name(name): source for name, source in contents.adapter.items()}
    path = folder / ADAPTER_WEIGHTS_NAME
    yield ADAPTER_WEIGHTS_NAME, write_tensor_file(path, _cast(sources, getattr(torch, contents.dtype)))


def _copy_files(folder: Path, paths: Sequence[Path]) -> Iterator[tuple[str, FileRecord]]:
    for path in paths:
        shutil.copyfile(path, folder / path.name)
        yield path.name, record_file(folder / path.name)


def split_adapter(sources: Sources) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
    """(base, adapter) of tensors under their names in an adapted PaliGemmaModel; base names lose peft's wrapping."""
    base = {base_name(name): source for name, source in sources.items() if not is_adapter(name)}
    return base, {name: source for name, source in sources.items() if is_adapter(name)}


def tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
