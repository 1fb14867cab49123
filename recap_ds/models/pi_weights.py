"""Published pi0 / pi0.5 tensors: which part of the model each belongs to, and its name there.

LeRobot puts ``model.`` before every name of openpi's PyTorch model; both are read. Strict: ``fill`` refuses a tensor
without a place and a parameter without a tensor, except the advantage indicator's, which nobody has published.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from recap_ds.errors import UsageError
from recap_ds.models.building import Builder, fill
from recap_ds.models.pi_joint import PiJointExpert
from recap_ds.models.vlm_weights import model_name

TOWERS = "paligemma_with_expert."
VLM, EXPERT = f"{TOWERS}paligemma.", f"{TOWERS}gemma_expert.model."
# Both towers come with a head over words that neither uses for actions; the VLM's is its embedding under another name.
VLM_HEAD, EXPERT_HEAD = f"{VLM}lm_head.weight", f"{TOWERS}gemma_expert.lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
UNPUBLISHED = "indicator_in.weight"


def pi_names(stored: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(VLM, expert): name in our module -> name in the file. UsageError where two tensors claim one place."""
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name in stored:
        bare = name.removeprefix("model.")
        if bare in (VLM_HEAD, EXPERT_HEAD):
            continue
        place = model_name(bare.removeprefix(VLM)) if bare.startswith(VLM) else bare.removeprefix(EXPERT)
        if place is None:
            continue
        part = parts[0] if bare.startswith(VLM) else parts[1]
        if place in part:
            raise UsageError(f"model.safetensors: '{name}' and '{part[place]}' are the same tensor; keep one")
        part[place] = name
    if EMBEDDING not in parts[0]:
        # Of two names of one tensor, safetensors keeps one.
        for name in (name for name in stored if name.removeprefix("model.") == VLM_HEAD):
            parts[0][EMBEDDING] = name
    return parts


def load_pi_weights(file: Path, paligemma: nn.Module, expert: PiJointExpert, builder: Builder) -> None:
    """Every tensor of ``file`` into its place, one in memory at a time."""
    try:
        with safe_open(file, framework="pt") as reader:
            vlm, head = pi_names(list(reader.keys()))

            def tensors(names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
                for place, stored in names.items():
                    yield place, reader.get_tensor(stored)

            fill(paligemma, tensors(vlm), builder)
            fill(expert, _with_indicator(tensors(head), expert, builder), builder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    except ValueError as error:
        raise UsageError(f"{file}: does not hold this model: {error}") from None


def _with_indicator(
    values: Iterator[tuple[str, Tensor]], expert: PiJointExpert, builder: Builder
) -> Iterator[tuple[str, Tensor]]:
    yield from values
    yield UNPUBLISHED, torch.zeros(builder.full_shape(expert.get_parameter(UNPUBLISHED)))
