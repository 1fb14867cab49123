"""Between a plain policy in memory and its tensors in files: exports, and one-file checkpoints of plain PyTorch.

Loading is strict: every tensor has a place, every parameter gets a tensor, shapes agree, checksums hold. What does not
fit is a UsageError naming the first difference; nothing is loaded "best case".

Knows policies only as modules with ``config``, ``contract``, ``vlm`` and heads, so that ``policy.py`` can use it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.files.records import file_problems
from recap_ds.files.tensor_reader import FileTensor, TensorFileReader
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.models.backbones import names_in_files
from recap_ds.models.building import Builder, fill
from recap_ds.models.export_format import (
    ADAPTER_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    CRITICS,
    HEADS,
    TOKENIZER_NAME,
    VLM_NAME,
    ExportContents,
    ExportRecord,
    Provenance,
    head_file,
    split_adapter,
    tokenizer_files,
    vlm_config_json,
)
from recap_ds.models.export_write import write_export
from recap_ds.models.lora import is_adapter, peft_name
from recap_ds.models.vlm_weights import locate_vlm, weight_files
from recap_ds.processing.contract import CONTRACT_NAME, RobotContract
from recap_ds.recipe import dump_config, load_config

STATE_FORMAT = "recap_ds plain checkpoint 1"

Policy = TypeVar("Policy", bound=nn.Module)


# -- exports ----------------------------------------------------------------------------------------------------------


def save_export(policy: nn.Module, folder: str | Path, *, overwrite: bool = False) -> ExportRecord:
    """Write a policy in memory as an export, in float32."""
    vlm, adapter = split_adapter(_sources(policy.vlm.network))
    source = policy.tokenizer_folder or locate_vlm(policy.config.vlm_source)
    contents = ExportContents(
        config=policy.config,
        contract=policy.contract,
        provenance=Provenance(),
        dtype="float32",
        vlm=names_in_files(policy.config, vlm),
        vlm_config=vlm_config_json(policy.vlm.network.config),
        adapter=adapter,
        heads={head: _sources(module) for head, module in policy.named_children() if head in HEADS},
        tokenizer_files=tokenizer_files(source) if source else (),
    )
    return write_export(Path(folder), contents, overwrite=overwrite)


def _sources(module: nn.Module) -> dict[str, TensorSource]:
    if any(parameter.numel() == 0 for parameter in module.parameters()):
        raise UsageError("the policy is sharded inside an engine; save a checkpoint and use recap-ds consolidate")
    return {name: TensorSource.of(parameter.detach()) for name, parameter in module.named_parameters()}


def load_export(
    policy_class: Callable[..., Policy],
    export: str | Path,
    overrides: Sequence[str] = (),
    revision: str | None = None,
) -> Policy:
    """A policy on the CPU in eval mode, float32; ``overrides`` change settings that no weight depends on.

    Where critics were left out of the export, the policy has none: it acts, but cannot judge or train.
    """
    folder = locate_export(export, revision)
    record = ExportRecord.load(folder)
    if problems := file_problems(folder, record.files):
        raise UsageError(f"{folder}: {problems[0]}; copy or consolidate the export again")
    if record.vlm_is_plain_transformers is None:
        raise UsageError(f"{folder}: holds an adapter alone; load it with peft, or consolidate without --adapter-only")
    config: PiStarRECAPConfig = load_config(folder / CONFIG_NAME, overrides)
    policy = policy_class(config, vlm_folder=str(folder / VLM_NAME))
    policy.contract = RobotContract.load(folder) if CONTRACT_NAME in record.files else None
    policy.tokenizer_folder = folder / TOKENIZER_NAME if (folder / TOKENIZER_NAME).is_dir() else None
    for head in config.heads:
        if head in record.heads:
            fill_from_file(policy.get_submodule(head), folder / head_file(head), Builder())
        elif head in CRITICS and config.training.stage == "joint":
            delattr(policy, head)
        else:
            raise UsageError(f"{folder}: holds no {head}, which stage {config.training.stage} of its {CONFIG_NAME} has")
    if record.adapter == "separate":
        fill_adapter(policy.vlm.network, folder, Builder())
    return policy.eval()


def locate_export(export: str | Path, revision: str | None = None) -> Path:
    """A folder, or a hub id, which is downloaded once into the hub's cache; ``revision``: its branch, tag or commit."""
    folder = Path(export).expanduser()
    if folder.exists() or str(export).startswith((".", "/", "~")) or str(export).count("/") != 1:
        if revision is not None:
            raise UsageError(
                f"{export}: is a folder, which has no revision '{revision}'; leave it out, or give a hub id"
            )
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(export), revision=revision))
    except Exception as error:  # the hub client raises many kinds; each becomes the same advice
        reason = str(error).split("\n")[0][:160]
        raise UsageError(f"{export}: is no folder and not to be had from the hub ({reason})") from None


def fill_from_file(module: nn.Module, file: Path, builder: Builder, left_out: Sequence[str] = ()) -> None:
    """Every parameter of ``module`` from a safetensors file with exactly those tensors, and ``left_out``."""
    try:
        fill(module, ((name, value) for name, value in _tensors(file) if name not in left_out), builder)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{file}: does not fit the model of {CONFIG_NAME}: {error}") from None


def fill_adapter(paligemma: nn.Module, export: Path, builder: Builder) -> None:
    """The adapter's matrices from the export's."""
    file = export / ADAPTER_NAME / ADAPTER_WEIGHTS_NAME
    params = {peft_name(name): param for name, param in paligemma.named_parameters() if is_adapter(name)}
    stored = dict(_tensors(file))
    for name in sorted(params.keys() ^ stored.keys()):
        raise UsageError(f"{file}: {'lacks' if name in params else 'has no use for'} '{name}'")
    for name, param in params.items():
        wanted = tuple(builder.full_shape(param))
        if wanted != stored[name].shape:
            raise UsageError(f"{file}: '{name}' is {stored[name].shape}, the model needs {wanted}")
        builder.write_from_file(param, stored[name])


def _tensors(file: Path) -> Iterator[tuple[str, FileTensor]]:
    """What is no safetensors file is a UsageError."""
    reader = TensorFileReader(file)
    for name in reader.tensors:
        yield name, reader.tensor(name)


def folder_sources(folder: Path, read_name: Callable[[str], str | None]) -> dict[str, TensorSource]:
    """Tensors of a transformers folder by their names inside the network, none of them read yet."""
    sources = {}
    for file in weight_files(folder):
        reader = TensorFileReader(file)
        for stored in reader.tensors:
            if (name := read_name(stored)) is not None:
                sources[name] = reader.source(stored)
    return sources


# -- one file, plain PyTorch ------------------------------------------------------------------------------------------


def save_state(policy: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None) -> None:
    """Every parameter in one safetensors file; the recipe and ``metadata`` (JSON) in its header."""
    header = {
        "recap_ds": STATE_FORMAT,
        "config": dump_config(policy.config),
        "metadata": json.dumps(dict(metadata or {})),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    write_tensor_file(unfinished, _sources(policy), header)
    unfinished.replace(path)


def load_state(policy: nn.Module, path: str | Path) -> dict[str, Any]:
    """Fill ``policy`` in place and return the ``metadata`` it was saved with."""
    path = Path(path)
    header = TensorFileReader(path).metadata
    if header.get("recap_ds") != STATE_FORMAT:
        raise UsageError(f"{path}: was not written by save_checkpoint; use from_pretrained for an export")
    fill_from_file(policy, path, Builder())
    return json.loads(header["metadata"])
