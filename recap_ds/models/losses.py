"""What one forward of a stage returns: per-sample losses and values, and the one scalar to differentiate.

Losses are sums over this micro-batch divided by a normaliser that belongs to the whole optimizer step, all ranks and
micro-batches together: a mean of means would weigh a valid action by the company it keeps. A stage leaves None where it
has nothing to say: it has no policy, or no critic, or one that knows no Q.

    B samples   H chunk   A action dims
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig


class LossNormalizers(NamedTuple):
    """Valid counts of the optimizer step, as the mean over its micro-batches (0-dim float32).

    The engine averages gradients over ranks and micro-batches, so dividing by the MEAN count gives sum / total.
    """

    flow: Tensor  # action elements: valid frames x real dims x flow draws
    td: Tensor  # samples with a TD target
    monte_carlo: Tensor  # samples with a known return
    action_tokens: Tensor


class TrainOutput(NamedTuple):
    """``loss`` carries the gradient; everything else is detached, per sample [B]."""

    loss: Tensor
    policy_loss: Tensor | None = None  # mean squared velocity error over the sample's valid elements
    q_loss: Tensor | None = None
    v_loss: Tensor | None = None  # expectile loss; of a distributional critic, negative log-likelihood
    q: Tensor | None = None  # min_j Qbar_j
    v: Tensor | None = None
    advantage: Tensor | None = None  # of the stage's own critic
    td_error: Tensor | None = None  # mean over heads of Q - target
    target_gap: Tensor | None = None  # mean over heads of |Q - Qbar|
    value_error: Tensor | None = None  # |V - return|, 0 where the return is not known
    weight: Tensor | None = None  # policy weight: source weight x extraction weight
    indicator: Tensor | None = None
    action_token_loss: Tensor | None = None  # mean cross-entropy over the sample's action tokens
    action_token_accuracy: Tensor | None = None  # share of them that are the most probable


class EvaluationOutput(NamedTuple):
    """Held-out measures per sample; flow losses by indicator (none, negative, positive) on the seeded time grid."""

    flow_loss: Tensor | None = None  # [B, 3]
    q_loss: Tensor | None = None  # [B]
    v_loss: Tensor | None = None  # [B]
    q: Tensor | None = None  # [B]
    v: Tensor | None = None  # [B]
    v_shuffled: Tensor | None = None  # [B], V with the images of another sample
    actions: Tensor | None = None  # [B, H, A], sampled with the positive indicator, normalised units
    unconditioned_actions: Tensor | None = None  # [B, H, A], sampled from the same noise without indicator


def without_padding(batch: TransitionBatch) -> TransitionBatch:
    """Zero what stands in place of an action, and noise in dims the robot lacks: neither may change any output."""
    dims = batch.action_dim_mask[:, None, :]
    return batch._replace(
        actions=torch.where(batch.action_valid[:, :, None] & dims, batch.actions, 0.0),
        noise=torch.where(dims[:, None], batch.noise, 0.0),
    )


def count_flow_elements(batch: TransitionBatch) -> Tensor:
    """[B] float32: what the sample's policy loss sums over."""
    return batch.action_valid.sum(dim=1).float() * batch.action_dim_mask.sum(dim=1).float() * float(batch.time.shape[1])


def value_mask(config: PiStarRECAPConfig, batch: TransitionBatch) -> Tensor:
    """[B] bool, True = V's loss counts the sample: it has a target of the kind its critic learns from."""
    return batch.mc_valid if config.value.critic == "distributional" else batch.td_valid


def local_counts(batch: TransitionBatch) -> Tensor:
    """[4] float32: this micro-batch's share of the counts in ``LossNormalizers``."""
    masks = (batch.td_valid, batch.mc_valid, batch.action_token_mask)
    return torch.stack([count_flow_elements(batch).sum(), *(mask.sum().float() for mask in masks)])


def normalizers(mean_counts: Tensor) -> LossNormalizers:
    """From the step's mean of ``local_counts``; a step without any valid element divides by one instead of zero."""
    return LossNormalizers(*torch.where(mean_counts > 0, mean_counts, 1.0).unbind())
