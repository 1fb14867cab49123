"""Published pi0 / pi0.5 tensors: which part of the model each belongs to, and its name there; and the way back.

LeRobot puts ``model.`` before every name of openpi's PyTorch model; both are read. Strict: whoever loads refuses a
tensor without a place and a parameter without a tensor, except the advantage indicator's, which nobody has published.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recap_ds.errors import UsageError
from recap_ds.files.tensor_reader import FileTensor, TensorFileReader
from recap_ds.models.building import Builder, fill
from recap_ds.models.pi_joint import INDICATOR_NAME, PiJointExpert
from recap_ds.models.vlm_weights import model_name

LEROBOT = "model."
TOWERS = "paligemma_with_expert."
VLM, EXPERT = f"{TOWERS}paligemma.", f"{TOWERS}gemma_expert.model."
# Both towers come with a head over words that neither uses for actions; the VLM's may be its embedding's other name.
VLM_HEAD, EXPERT_HEAD = f"{VLM}lm_head.weight", f"{TOWERS}gemma_expert.lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
UNPUBLISHED = INDICATOR_NAME


class PiNames(NamedTuple):
    """Names in a file, by what they are to us."""

    vlm: dict[str, str]  # name inside PaliGemmaModel -> name in the file
    expert: dict[str, str]  # name inside PiJointExpert -> name in the file
    unread: dict[str, str]  # openpi's name -> name in the file: nothing here has a use for these


def pi_names(stored: Sequence[str]) -> PiNames:
    """UsageError where two tensors claim one place."""
    names = PiNames({}, {}, {})
    for name in stored:
        bare = name.removeprefix(LEROBOT)
        of_vlm = bare.startswith(VLM)
        place = model_name(bare.removeprefix(VLM)) if of_vlm else bare.removeprefix(EXPERT)
        if place is None or bare == EXPERT_HEAD:
            part, place = names.unread, bare
        else:
            part = names.vlm if of_vlm else names.expert
        if place in part:
            raise UsageError(f"model.safetensors: '{name}' and '{part[place]}' are the same tensor; keep one")
        part[place] = name
    if EMBEDDING not in names.vlm and VLM_HEAD in names.unread:
        names.vlm[EMBEDDING] = names.unread.pop(VLM_HEAD)  # of two names of one tensor, safetensors keeps one
    return names


def published_vlm_name(place: str) -> str:
    """openpi's name of a tensor of PaliGemmaModel, as LeRobot 0.6 spells it behind its prefix."""
    tower = "vision_tower."
    inside = f"{tower}vision_model.{place.removeprefix(tower)}" if place.startswith(tower) else place
    return f"{VLM}model.{inside}"


def published_expert_name(place: str) -> str:
    return f"{EXPERT}{place}" if place.startswith(("layers.", "norm.")) else place


def load_pi_weights(file: Path, paligemma: nn.Module, expert: PiJointExpert, builder: Builder) -> None:
    """Every tensor of ``file`` into its place."""
    reader = TensorFileReader(file)
    names = pi_names(list(reader.tensors))

    def tensors(names: Mapping[str, str]) -> Iterator[tuple[str, FileTensor]]:
        for place, stored in names.items():
            yield place, reader.tensor(stored)

    try:
        fill(paligemma, tensors(names.vlm), builder)
        fill(expert, _with_indicator(tensors(names.expert), expert, builder), builder)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{file}: does not hold this model: {error}") from None


def _with_indicator(
    values: Iterator[tuple[str, FileTensor]], expert: PiJointExpert, builder: Builder
) -> Iterator[tuple[str, Tensor | FileTensor]]:
    yield from values
    yield UNPUBLISHED, torch.zeros(builder.full_shape(expert.get_parameter(UNPUBLISHED)))
