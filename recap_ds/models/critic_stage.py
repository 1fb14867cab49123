"""Stage ``critic``: VLM and critic alone (RECAP, arXiv 2511.14759, Eq. 1; IQL, arXiv 2110.06169).

The critic trains the VLM, unless that is frozen: nothing of either ever reaches a policy but the labels they write.
``value.critic`` says which: a distribution over the Monte-Carlo return, or twin Q and V by TD.

    B batch
"""

from typing import NamedTuple

import torch

from recap_ds.algo.iql import advantage as iql_advantage
from recap_ds.algo.value_distribution import cross_entropy, expected_value, hl_gauss, two_hot
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.backbones import Vlm
from recap_ds.models.critics import Critic, QNetworks
from recap_ds.models.iql_losses import critic_losses
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, TrainOutput
from recap_ds.models.pixels import to_pixels, training_pixels
from recap_ds.models.prefixes import encode_both, encode_shuffled
from recap_ds.models.value_head import DistributionalCritic
from recap_ds.models.vlm import PrefixFeatures

TARGETS = {"two_hot": two_hot, "hl_gauss": hl_gauss}


class CriticParts(NamedTuple):
    """What the stage trains and reads; modules of one container."""

    vlm: Vlm
    critic: Critic | DistributionalCritic
    target_critic: QNetworks | None  # None of a distributional critic


class ValueFit(NamedTuple):
    """What a distributional critic says of the samples, and how far off it is."""

    nll: torch.Tensor  # [B] with gradient, 0 where the return is not known
    v: torch.Tensor  # [B], mean of the distribution
    error: torch.Tensor  # [B], |V - return|, 0 where the return is not known


def critic_step(
    parts: CriticParts,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    normalizers: LossNormalizers,
    augmented: bool,
) -> TrainOutput:
    """Loss of one micro-batch; ``normalizers``: the whole step's counts."""
    pixels = training_pixels(batch.observation.images, batch.augmentation, augmented)
    if config.value.critic == "distributional":
        fit = _value_fit(parts, config, batch, parts.vlm(batch.observation, pixels))
        loss = fit.nll.sum() / normalizers.monte_carlo
        return TrainOutput(loss, v_loss=fit.nll.detach(), v=fit.v, value_error=fit.error)

    next_pixels = training_pixels(batch.next_observation.images, batch.augmentation, augmented)
    prefixes = encode_both(parts.vlm, batch, pixels, next_pixels)
    critic = critic_losses(parts.critic, parts.target_critic, config, batch, *prefixes)
    return TrainOutput(
        loss=critic.loss / normalizers.td,
        q_loss=critic.q_loss.detach(),
        v_loss=critic.v_loss.detach(),
        q=critic.target_q.amin(dim=0),
        v=critic.v.detach(),
        advantage=iql_advantage(critic.target_q, critic.v),
        td_error=critic.td_error,
        target_gap=critic.target_gap,
    )


@torch.no_grad()
def critic_evaluation(parts: CriticParts, config: PiStarRECAPConfig, batch: TransitionBatch) -> EvaluationOutput:
    """Held-out measures of one batch; draws nothing at random."""
    pixels, state = to_pixels(batch.observation.images), batch.observation.state
    v_shuffled = parts.critic.v(encode_shuffled(parts.vlm, batch, pixels), state)
    if config.value.critic == "distributional":
        fit = _value_fit(parts, config, batch, parts.vlm(batch.observation, pixels))
        return EvaluationOutput(v_loss=fit.nll, v=fit.v, v_shuffled=expected_value(v_shuffled))

    prefixes = encode_both(parts.vlm, batch, pixels, to_pixels(batch.next_observation.images))
    critic = critic_losses(parts.critic, parts.target_critic, config, batch, *prefixes)
    return EvaluationOutput(
        q_loss=critic.q_loss,
        v_loss=critic.v_loss,
        q=critic.target_q.amin(dim=0),
        v=critic.v,
        v_shuffled=v_shuffled,
    )


def _value_fit(
    parts: CriticParts, config: PiStarRECAPConfig, batch: TransitionBatch, prefix: PrefixFeatures
) -> ValueFit:
    logits = parts.critic.v(prefix, batch.observation.state)
    target = TARGETS[config.value.target](batch.mc_return, config.value.num_bins)
    known = batch.mc_valid.float()
    v = expected_value(logits.detach())
    return ValueFit(cross_entropy(logits, target) * known, v, (v - batch.mc_return).abs() * known)
