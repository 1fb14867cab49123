"""Implicit Q-learning (arXiv 2110.06169, section 4) over action chunks, as pure functions.

Losses come back unreduced, shape [B]: the mean belongs to the whole optimizer step over all ranks, which this file
knows nothing about, as it knows nothing of networks. Gradient flows only into what a loss trains: targets are detached.

    B samples   J Q networks   V(o) expectile value   Q_j(o, a) value of a chunk   Qbar_j its slowly following target
"""

import math

import torch
from torch import Tensor

MAX_EXTRACTION_WEIGHT = 100.0


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1[error < 0]| * error^2, where error = target - prediction."""
    squared = error.square()
    return torch.where(error < 0, (1.0 - expectile) * squared, expectile * squared)


def value_loss(target_q: Tensor, v: Tensor, expectile: float) -> Tensor:
    """V's loss: the expectile of min_j Qbar_j(o, a) over the data's actions. ``target_q`` [J, B], ``v`` [B]."""
    return expectile_loss(_pessimistic(target_q) - v, expectile)


def td_target(
    chunk_reward: Tensor, chunk_discount: Tensor, continues: Tensor, next_value: Tensor, clip: bool
) -> Tensor:
    """chunk_reward + chunk_discount * continues * V(o_{t+k}), without gradient. All [B].

    ``continues`` is 0 only where the task truly ended. ``clip`` keeps targets in [-1, 0], the range of normalised
    sparse_time returns; with environment rewards there is no such range.
    """
    target = (chunk_reward + chunk_discount * continues * next_value).detach()
    return target.clamp(-1.0, 0.0) if clip else target


def q_loss(q: Tensor, target: Tensor) -> Tensor:
    """Sum over the J heads of (Q_j - target)^2: each head learns as fast as it would alone. [J, B], [B] -> [B]."""
    return (q - target.detach()).square().sum(dim=0)


def advantage(target_q: Tensor, v: Tensor) -> Tensor:
    """A = min_j Qbar_j(o, a) - V(o), without gradient. [J, B], [B] -> [B]."""
    return _pessimistic(target_q) - v.detach()


def extraction_weight(advantage: Tensor, temperature: float, sigma: Tensor) -> Tensor:
    """min(exp(A / (temperature * sigma)), 100), without overflow; ``sigma`` is the spread of A in the sample's task.

    The temperature divides, in units of sigma. The paper's reference code multiplies: its 3 is our 1/3 at sigma 1.
    """
    exponent = advantage / (temperature * sigma)
    return exponent.clamp(max=math.log(MAX_EXTRACTION_WEIGHT)).exp().clamp(max=MAX_EXTRACTION_WEIGHT)


def _pessimistic(target_q: Tensor) -> Tensor:
    return target_q.detach().amin(dim=0)
