"""``recap-ds weights export --format lerobot``: an export as LeRobot's own policy folder, for pi0 and pi0.5.

    model.safetensors    by LeRobot's names, complete: its loader skips over what it misses with a warning
    config.json          of its policy type
    policy_*.json, *_step_*.safetensors    what it does around the policy, with the statistics of a robot's contract

LeRobot knows no advantage indicator. It is a constant once chosen, so it is folded into biases, exactly: adaRMS takes
its scales from W (time + indicator) + b, and pi0's time MLP is linear in the sum as well.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import file_problems, write_text
from recap_ds.files.tensor_reader import DTYPES, TensorFileReader
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.models.export_format import (
    ADAPTER_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    PUBLISHED_NAME,
    UNREAD_NAME,
    VLM_NAME,
    ExportRecord,
    head_file,
    merged,
)
from recap_ds.models.export_weights import folder_sources
from recap_ds.models.lora import ADAPTER
from recap_ds.models.vlm_weights import model_name
from recap_ds.processing.contract import CONTRACT_NAME, RobotContract
from recap_ds.recipe import load_config
from recap_ds.weights.architecture import read_json
from recap_ds.weights.lerobot_processors import policy_config, write_processors
from recap_ds.weights.names import (
    EMBEDDING,
    EXPERT_HEAD,
    LEROBOT,
    UNPUBLISHED,
    VLM_HEAD,
    published_expert_name,
    published_vlm_name,
)

AdvantageName = Literal["positive", "negative", "none"]
WEIGHTS_NAME = "model.safetensors"
# Words of PaliGemma, of which LeRobot keeps a row each; transformers' files end with 64 rows that no word has.
NUM_WORDS, NUM_ROWS = 257_152, 257_216
# The only sizes that LeRobot builds: last layer, width and MLP of both towers (gemma_2b, gemma_300m).
LAST_LAYER = "layers.17.mlp.gate_proj.weight"
BUILT_SIZES = {f"language_model.{LAST_LAYER}": (16384, 2048), LAST_LAYER: (4096, 1024)}


class Exported(NamedTuple):
    files: dict[str, int]  # bytes by name
    fits_lerobot: bool  # False = of other sizes than LeRobot builds


def export_lerobot(export: Path, out: Path, advantage: AdvantageName = "positive") -> Exported:
    """Write ``out`` whole or not at all. ``advantage``: what the policy is told for good."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"OUT {out}: is there already; name a new folder")
    record = ExportRecord.load(export)
    config = load_config(export / CONFIG_NAME)
    _check_kind(export, record, config, advantage)
    if problems := file_problems(export, record.files):
        raise UsageError(f"{export}: {problems[0]}; copy or consolidate the export again")
    contract = RobotContract.load(export) if CONTRACT_NAME in record.files else None
    origin = read_json(export / PUBLISHED_NAME) if PUBLISHED_NAME in record.files else None
    unread = _file_sources(export / UNREAD_NAME) if UNREAD_NAME in record.files else {}
    vlm, expert = _vlm(export, record, config), _expert(export, config, advantage)
    tensors = _published(vlm, expert, unread)
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        dtype = DTYPES["BF16" if record.dtype == "bfloat16" else "F32"]
        write_tensor_file(unfinished / WEIGHTS_NAME, _in_dtypes(tensors, dtype, origin, unread))
        settings = _settings(config, contract, record, origin)
        write_text(unfinished / "config.json", json.dumps(settings, indent=4) + "\n")
        write_processors(unfinished, config, contract, settings)
        sync_folder(unfinished)
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # what went wrong before is the error to report
        raise
    shapes = {name: source.shape for name, source in {**vlm, **expert}.items()}
    fits = all(shapes.get(name) == shape for name, shape in BUILT_SIZES.items())
    return Exported({path.name: path.stat().st_size for path in sorted(out.iterdir())}, fits)


def _check_kind(export: Path, record: ExportRecord, config: PiStarRECAPConfig, advantage: AdvantageName) -> None:
    if "action_expert" not in record.heads or config.model.action_expert != "pi_joint":
        raise UsageError(
            f"{export}: LeRobot has no such policy; it has pi0 and pi0.5, which are model.action_expert=pi_joint"
        )
    if config.model.advantage_conditioning == "text" and advantage != "none":
        raise UsageError(
            f"{export}: reads its advantage in words that its prompt does not see, which LeRobot has no place for; "
            "give --advantage none"
        )
    if record.vlm_is_plain_transformers is None:
        raise UsageError(f"{export}: holds an adapter alone; consolidate without --adapter-only")


def _vlm(export: Path, record: ExportRecord, config: PiStarRECAPConfig) -> dict[str, TensorSource]:
    base = folder_sources(export / VLM_NAME, model_name)
    if base[EMBEDDING].shape[0] == NUM_ROWS:
        base[EMBEDDING] = _first_rows(base[EMBEDDING], NUM_WORDS)
    if record.adapter != "separate":
        return base
    reader = TensorFileReader(export / ADAPTER_NAME / ADAPTER_WEIGHTS_NAME)
    inside = {_adapter_name(name): reader.source(name) for name in reader.tensors}
    return merged(base, inside, config.lora)


def _first_rows(source: TensorSource, num_rows: int) -> TensorSource:
    shape = (num_rows, *source.shape[1:])

    def pieces() -> Iterator[Tensor]:
        rest = torch.Size(shape).numel()
        for piece in source.pieces():
            yield piece[:rest]
            rest -= min(rest, piece.numel())

    return source._replace(shape=shape, pieces=pieces)


def _adapter_name(stored: str) -> str:
    """``lora.peft_name``, the other way."""
    name = stored.removeprefix("base_model.model.model.")
    return name.removesuffix(".weight") + f".{ADAPTER}.weight"


def _file_sources(file: Path) -> dict[str, TensorSource]:
    reader = TensorFileReader(file)
    return {name: reader.source(name) for name in reader.tensors}


def _expert(export: Path, config: PiStarRECAPConfig, advantage: AdvantageName) -> dict[str, TensorSource]:
    """The expert's tensors without the indicator's, which is in their biases then."""
    sources = _file_sources(export / head_file("action_expert"))
    if config.recap.policy_extraction == "weighted":
        advantage = "none"  # such a policy was trained without indicators, and acts without one
    if config.model.advantage_conditioning == "text":
        return sources  # without words, as it acts on its own: ``_check_kind``
    shift = sources.pop(UNPUBLISHED).read()[INDICATOR_IDS[advantage]].float()
    if not shift.any():
        return sources  # of an import: the same bytes go out that came in
    width = shift.numel()
    if config.model.pi_version == "pi05":
        stems = [name.removesuffix(".weight") for name in sources if name.endswith("norm.dense.weight")]
        columns = slice(None)
    else:
        stems, columns = ["action_time_mlp_in"], slice(width, None)  # [action, time]
    for stem in stems:
        folded = partial(_folded, sources[f"{stem}.weight"], sources[f"{stem}.bias"], columns, shift)
        sources[f"{stem}.bias"] = sources[f"{stem}.bias"]._replace(pieces=folded)
    return sources


def _folded(weight: TensorSource, bias: TensorSource, columns: slice, shift: Tensor) -> Iterator[Tensor]:
    yield bias.read().double() + weight.read()[:, columns].double() @ shift.double()


def _published(
    vlm: Mapping[str, TensorSource], expert: Mapping[str, TensorSource], unread: Mapping[str, TensorSource]
) -> dict[str, TensorSource]:
    """By openpi's names. Heads over words that nobody kept: the VLM's is its embedding, the expert's zeros."""
    tensors = {published_vlm_name(place): source for place, source in vlm.items()}
    tensors |= {published_expert_name(place): source for place, source in expert.items()}
    vocabulary = vlm[EMBEDDING].shape[0]
    width = expert["action_in_proj.weight"].shape[0]
    no_head = TensorSource.ranges((vocabulary, width), torch.float32, lambda _, length: torch.zeros(length))
    return {VLM_HEAD: vlm[EMBEDDING], EXPERT_HEAD: no_head, **tensors, **unread}


def _in_dtypes(
    tensors: Mapping[str, TensorSource],
    dtype: torch.dtype,
    origin: Mapping[str, Any] | None,
    unread: Mapping[str, TensorSource],
) -> dict[str, TensorSource]:
    """By LeRobot's names, each in the dtype it was published in, or in the export's."""
    known = (
        {} if origin is None else {name.removeprefix(LEROBOT): DTYPES[code] for name, code in origin["dtypes"].items()}
    )
    cast = {name: source if name in unread else source.cast(known.get(name, dtype)) for name, source in tensors.items()}
    return {LEROBOT + name: cast[name] for name in sorted(cast)}


def _settings(
    config: PiStarRECAPConfig, contract: RobotContract | None, record: ExportRecord, origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """``config.json``; the one that came with the weights, where it was LeRobot's."""
    own = policy_config(config, contract, record.dtype)
    if origin is None or origin["form"] != "lerobot" or "paligemma_variant" not in origin["config"]:
        return own
    return {**own, **origin["config"], "chunk_size": config.chunk_size, "n_action_steps": config.chunk_size}
