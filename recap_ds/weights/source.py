"""What somebody published: a folder, a file or a hub id with safetensors, opened without reading a value.

pi0 and pi0.5 in LeRobot's and openpi's (PyTorch) form, and PaliGemma in transformers'; what it is, the tensors' names
say. ``config.json`` adds what names and shapes cannot: LeRobot's, openpi's, or one that spells every size out, as
``recap-ds weights parity`` reads it. A checkpoint of openpi's own training has none.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recap_ds.errors import UsageError
from recap_ds.files.tensor_reader import StoredTensor, TensorFileReader
from recap_ds.files.tensors import TensorSource
from recap_ds.models.export_format import EXPORT_NAME
from recap_ds.models.vlm_weights import model_name, weight_files
from recap_ds.weights.architecture import PiArchitecture, check_architecture, read_json, sizes_of
from recap_ds.weights.names import EMBEDDING, LEROBOT, TOWERS, PiNames, pi_names

PI_DEFAULTS = {"chunk_size": 50, "max_state_dim": 32, "num_inference_steps": 10}
# What the same thing is called in LeRobot's config.json and in openpi's.
CHUNK_KEYS, STATE_KEY, STEPS_KEY = ("chunk_size", "action_horizon"), "max_state_dim", "num_inference_steps"


class Published(NamedTuple):
    kind: Literal["pi05", "pi0", "paligemma"]
    form: Literal["lerobot", "openpi", "transformers"]
    folder: Path
    settings: dict[str, Any]  # of config.json; empty where there is none
    tensors: dict[str, StoredTensor]
    sources: dict[str, TensorSource]
    names: PiNames  # of a PaliGemma, without an expert

    def shapes(self, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        return {place: self.tensors[name].shape for place, name in names.items()}


def open_published(path: str) -> Published:
    """UsageError for what is none of these."""
    folder, files = _locate(path)
    if (folder / EXPORT_NAME).is_file():
        raise UsageError(f"PATH {folder}: is an export already; training.start_from takes it as it is")
    readers = [TensorFileReader(file) for file in files]
    tensors: dict[str, StoredTensor] = {}
    sources: dict[str, TensorSource] = {}
    for file, reader in zip(files, readers, strict=True):
        for name, tensor in reader.tensors.items():
            if name in tensors:
                raise UsageError(f"{file}: '{name}' is in another file as well; keep one")
            tensors[name], sources[name] = tensor, reader.source(name)
    config = folder / "config.json"
    settings = read_json(config) if config.is_file() else {}
    if any(name.removeprefix(LEROBOT).startswith(TOWERS) for name in tensors):
        names = pi_names(list(tensors))
        kind = _version(names, folder)
        form = "lerobot" if any(name.startswith(LEROBOT + TOWERS) for name in tensors) else "openpi"
        return Published(kind, form, folder, settings, tensors, sources, names)
    names = _paligemma_names(list(tensors))
    if EMBEDDING not in names.vlm or not any(name.startswith("vision_tower.") for name in names.vlm):
        raise UsageError(
            f"{folder}: is no pi0, pi0.5 or PaliGemma by its tensors' names (the first is '{min(tensors, default='')}')"
        )
    return Published("paligemma", "transformers", folder, settings, tensors, sources, names)


def pi_architecture(published: Published) -> PiArchitecture:
    """Sizes by config.json where it spells them out, else by the shapes. UsageError where they do not make a model."""
    settings, names, where = published.settings, published.names, published.folder / "config.json"
    named = settings.get("type")
    if named is not None and named != published.kind:
        raise UsageError(f"{where}: type is {named}, and the tensors are those of {published.kind}")
    if "text" in settings:
        return check_architecture(settings, where)
    expert = published.shapes(names.expert)
    try:
        sizes = sizes_of(published.shapes(names.vlm), expert)
        state_dim = expert.get("state_proj.weight", (0, settings.get(STATE_KEY, PI_DEFAULTS[STATE_KEY])))[1]
        values = {
            **sizes,
            "type": published.kind,
            "chunk_size": next((settings[key] for key in CHUNK_KEYS if key in settings), PI_DEFAULTS["chunk_size"]),
            "max_action_dim": expert["action_in_proj.weight"][1],
            "max_state_dim": state_dim,
            "num_inference_steps": settings.get(STEPS_KEY, PI_DEFAULTS[STEPS_KEY]),
            "num_cameras": 3,
        }
    except UsageError as error:
        raise UsageError(f"{published.folder}: {error}") from None
    except (KeyError, IndexError):
        raise UsageError(f"{published.folder}: holds no tensor 'action_in_proj.weight' of two dims") from None
    return check_architecture(values, where)


def _version(names: PiNames, folder: Path) -> Literal["pi05", "pi0"]:
    for version, name in (("pi05", "time_mlp_in.weight"), ("pi0", "action_time_mlp_in.weight")):
        if name in names.expert:
            return version
    raise UsageError(f"{folder}: holds neither 'time_mlp_in' (pi0.5) nor 'action_time_mlp_in' (pi0): no flow expert")


def _paligemma_names(stored: list[str]) -> PiNames:
    names = PiNames({}, {}, {})
    for name in stored:
        place = model_name(name)
        part, key = (names.unread, name) if place is None else (names.vlm, place)
        if key in part:
            raise UsageError(f"'{name}' and '{part[key]}' are the same tensor; keep one")
        part[key] = name
    return names


def _locate(path: str) -> tuple[Path, list[Path]]:
    """Folder and safetensors files of a folder, one file, or a hub id, which is downloaded once into its cache."""
    found = Path(path).expanduser()
    if found.is_file():
        if found.suffix != ".safetensors":
            raise UsageError(f"{found}: is no .safetensors file; others may run code when they are read")
        return found.parent, [found]
    if not found.is_dir():
        found = _download(path)
    return found, weight_files(found, "PATH")


def _download(path: str) -> Path:
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UsageError(f"PATH {path}: there is no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub client raises many kinds; each becomes the same advice
        reason = str(error).split("\n")[0][:160]
        raise UsageError(
            f"PATH {path}: is no folder and not to be had from the hub ({reason}); where it is gated, accept its "
            "licence and log in (hf auth login), or download it and name the folder"
        ) from None
