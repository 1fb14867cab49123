"""Writing an export: whole or not at all, and read back before it gets its name.

Everything is written as a stream into a hidden folder beside, flushed, read back from the disk against the checksums of
what was sent there, and only then renamed. A process that is killed leaves the hidden folder; the next one of the same
name begins it anew.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import FileRecord, file_problems, record_file, sync_file, write_text
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.models.export_card import CARD_NAME, model_card
from recap_ds.models.export_format import (
    ADAPTER_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    DEFAULT_MAX_SHARD_BYTES,
    EXPORT_NAME,
    PUBLISHED_NAME,
    TOKENIZER_NAME,
    UNREAD_NAME,
    VLM_CONFIG_NAME,
    VLM_INDEX_NAME,
    VLM_NAME,
    VLM_WEIGHTS_NAME,
    ExportContents,
    ExportRecord,
    Sources,
    head_file,
    stored_name,
)
from recap_ds.models.lora import peft_config, peft_name
from recap_ds.processing.contract import CONTRACT_NAME
from recap_ds.recipe import dump_config

LOCK_NAME = ".lock"


def write_export(
    out: Path, contents: ExportContents, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, overwrite: bool = False
) -> ExportRecord:
    """Write ``out`` whole or not at all. Refuses a folder that is there unless it is an export and ``overwrite``."""
    check_out(out, overwrite)
    out = out.absolute()
    unfinished, old = (out.with_name(f".{out.name}.{state}") for state in ("unfinished", "old"))
    with _claimed(unfinished):
        record = _write_files(unfinished, contents, max_shard_bytes)
        write_text(unfinished / CARD_NAME, model_card(record, contents))
        _read_back(unfinished, record)
        record.save(unfinished)
        sync_folder(unfinished)
        if old.exists():  # of a run that was killed between the next lines
            shutil.rmtree(old)
        if out.exists():
            os.replace(out, old)
        os.replace(unfinished, out)
        sync_folder(out.parent)
        (out / LOCK_NAME).unlink()
        if old.exists():
            shutil.rmtree(old)
    return record


def check_out(out: Path, overwrite: bool) -> None:
    """UsageError where writing to ``out`` would destroy something that is not an older export."""
    if out.is_symlink():
        raise UsageError(f"OUT {out}: is a link; name the folder itself")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not out.exists():
        return
    if not (out / EXPORT_NAME).is_file():
        raise UsageError(f"OUT {out}: is there already and is no export; name a new folder")
    if not overwrite:
        raise UsageError(f"OUT {out}: holds an export; give --overwrite, or name another folder")


@contextmanager
def _claimed(unfinished: Path) -> Iterator[None]:
    """An empty ``unfinished``, for this process alone; removed where writing fails (the disk may be full)."""
    unfinished.mkdir(parents=True, exist_ok=True)
    with open(unfinished / LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(f"{unfinished}: another process is writing this export; wait for it") from None
        try:
            for path in unfinished.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
            yield
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # what went wrong before is the error to report
            raise


def _write_files(folder: Path, contents: ExportContents, max_shard_bytes: int) -> ExportRecord:
    files: dict[str, FileRecord] = {}
    files[CONFIG_NAME] = write_text(folder / CONFIG_NAME, dump_config(contents.config))
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
    if contents.published is not None:
        files[PUBLISHED_NAME] = write_text(folder / PUBLISHED_NAME, json.dumps(contents.published, indent=1) + "\n")
        files[UNREAD_NAME] = write_tensor_file(folder / UNREAD_NAME, contents.unread)
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


def _read_back(folder: Path, record: ExportRecord) -> None:
    """RunFailed where the disk does not give back what was written; asked past the cache, as far as the system lets."""
    for name in record.files:
        sync_file(folder / name)
        with open(folder / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if problems := file_problems(folder, record.files):
        raise RunFailed(f"{folder}: read back after writing, {problems[0]}; the disk cannot be trusted")
