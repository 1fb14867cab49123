"""Which VLM a run builds, and what its tensors are called: in the policy, and in files that transformers reads.

``shared``: the PaliGemma of ``model.*`` (``vlm.py``). ``own``: a critic's, of any architecture (``own_backbone.py``).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.action_tokens import last_action_word
from recap_ds.models.advantage_words import advantage_words
from recap_ds.models.building import Builder
from recap_ds.models.experts import needs_keys, pi_dimensions
from recap_ds.models.own_architecture import Rehearsal, load_architecture, rehearse, stored_name_reader
from recap_ds.models.own_backbone import OwnBackbone
from recap_ds.models.vlm import VisionLanguageModel, tiny_config
from recap_ds.models.vlm_weights import load_vlm_config, locate_vlm, model_name

Vlm = VisionLanguageModel | OwnBackbone
Value = TypeVar("Value")


def build_vlm(config: PiStarRECAPConfig, builder: Builder, folder: str | None) -> Vlm:
    """``folder`` overrides where its weights are read from. Collective where ``builder`` shards."""
    if config.has_own_backbone:
        return OwnBackbone(config, builder, folder)
    words = advantage_words(config, builder, folder) if config.is_told_in_words else None
    return VisionLanguageModel(
        config.model, config.lora, builder, config.training.seed, folder, needs_keys(config), words
    )


def check_vlm(config: PiStarRECAPConfig, start: Path | None = None) -> None:
    """UsageError where the VLM's folder does not hold what the run needs; quick, and before any process group.

    ``start``: the folder of the VLM that the run begins with (``training.start_from``) in place of the settings', which
    need not be there then. A critic's own is compared with them: its tokenizer is that of the settings.
    """
    if config.has_own_backbone:
        _check_own(config, start)
        return
    folder = start or locate_vlm(config.vlm_source)
    image_size = config.model.image_size
    architecture = tiny_config(image_size) if folder is None else load_vlm_config(folder, image_size)
    if needs_keys(config):
        pi_dimensions(config.model, architecture.text_config)
    if config.learns_action_tokens:
        last_action_word(architecture.text_config, config.model.action_vocabulary)


def _check_own(config: PiStarRECAPConfig, start: Path | None) -> None:
    folder = locate_vlm(config.vlm_source)
    rehearsal = _rehearsed(config, folder)
    if start is not None and _rehearsed(config, start).shapes != rehearsal.shapes:
        raise UsageError(f"training.start_from: {start} holds another model than value.vlm_model_name, {folder}")


def _rehearsed(config: PiStarRECAPConfig, folder: Path) -> Rehearsal:
    source, image_size = config.vlm_source, config.model.image_size
    return rehearse(load_architecture(folder, source, image_size), source, image_size)


def vlm_prefix(config: PiStarRECAPConfig) -> str:
    """What the VLM's parameters begin with in the policy."""
    return "vlm.network." if config.has_own_backbone else "vlm.paligemma."


def names_in_files(config: PiStarRECAPConfig, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """``tensors`` by name inside the network -> by what ``export_format.stored_name`` is to spell them from.

    PaliGemma is spelled as every version of transformers reads it; an own backbone as its own class has it.
    """
    return {f"model.{name}": value for name, value in tensors.items()} if config.has_own_backbone else dict(tensors)


def name_reader(config: PiStarRECAPConfig, folder: Path) -> Callable[[str], str | None]:
    """From a tensor's name in ``folder``'s files to the one inside the network; None for what it has no use for."""
    if not config.has_own_backbone:
        return model_name
    return stored_name_reader(load_architecture(folder, config.vlm_source, config.model.image_size))
