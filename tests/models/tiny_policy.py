"""A tiny policy whose zero layers are awake, and one training forward of it."""

from typing import Any

import torch
from torch import Tensor

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import TransitionBatch, map_tensors
from recap_ds.models.losses import TrainOutput, local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.tiny import random_batch, tiny_config, wake

FROZEN, FULL = {"model": {"freeze_vlm": True}}, {"model": {"freeze_vlm": False}}
LORA = {"lora": {"enabled": True, "rank": 4}}
READY = AdvantageScale(torch.tensor([0.0, 0.01]), torch.tensor([0.05, 0.1]), torch.tensor([True, True]))


def build(**overrides: Any) -> tuple[PiStarRECAPPolicy, TransitionBatch]:
    config = tiny_config(**overrides)
    policy = PiStarRECAPPolicy(config)
    wake(policy)
    return policy, random_batch(config, 8, seed=0)


def train(
    policy: PiStarRECAPPolicy,
    batch: TransitionBatch,
    scale: AdvantageScale = READY,
    counts: Tensor | None = None,
    warming_up: bool = False,
) -> TrainOutput:
    """``counts``: the step's mean counts, by default those of this batch alone."""
    counts = local_counts(batch) if counts is None else counts
    return policy(batch, "train", scale, normalizers(counts), warming_up)


def gradients(policy: PiStarRECAPPolicy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def rows(batch: TransitionBatch, part: slice | Tensor) -> TransitionBatch:
    return map_tensors(lambda tensor: tensor[part], batch)
