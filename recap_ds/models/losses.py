"""What one forward of the joint stage returns: per-sample losses and values, and the one scalar to differentiate.

Losses are sums over this micro-batch divided by a normaliser that belongs to the whole optimizer step, all ranks and
micro-batches together: a mean of means would weigh a valid action by the company it keeps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.batch import TransitionBatch


class LossNormalizers(NamedTuple):
    """Valid counts of the optimizer step, as the mean over its micro-batches (0-dim float32).

    The engine averages gradients over ranks and micro-batches, so dividing by the MEAN count gives sum / total.
    """

    flow: Tensor  # action elements: valid frames x real dims x flow draws
    td: Tensor  # samples with a TD target


class TrainOutput(NamedTuple):
    """``loss`` carries the gradient; everything else is detached, per sample [B]."""

    loss: Tensor
    policy_loss: Tensor  # mean squared velocity error over the sample's valid elements
    q_loss: Tensor
    v_loss: Tensor
    q: Tensor  # min_j Qbar_j
    v: Tensor
    advantage: Tensor
    td_error: Tensor  # mean over heads of Q - target
    target_gap: Tensor  # mean over heads of |Q - Qbar|
    weight: Tensor  # policy weight: source weight x extraction weight
    indicator: Tensor


class EvaluationOutput(NamedTuple):
    """Held-out measures per sample; flow losses by indicator (none, negative, positive) on the seeded time grid."""

    flow_loss: Tensor  # [B, 3]
    q_loss: Tensor  # [B]
    v_loss: Tensor  # [B]
    q: Tensor  # [B]
    v: Tensor  # [B]
    v_shuffled: Tensor  # [B], V with the images of another sample
    actions: Tensor  # [B, H, A], sampled with the positive indicator, normalised units
    unconditioned_actions: Tensor  # [B, H, A], sampled from the same noise without indicator


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


def local_counts(batch: TransitionBatch) -> Tensor:
    """[2] float32: this micro-batch's share of (flow elements, TD targets)."""
    return torch.stack([count_flow_elements(batch).sum(), batch.td_valid.sum().float()])


def normalizers(mean_counts: Tensor) -> LossNormalizers:
    """From the step's mean of ``local_counts``; a step without any valid element divides by one instead of zero."""
    flow, td = torch.where(mean_counts > 0, mean_counts, 1.0).unbind()
    return LossNormalizers(flow, td)
