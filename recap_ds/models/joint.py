"""Stage ``joint``: VLM, action expert and IQL critics in one loss (RECAP, arXiv 2511.14759; IQL, arXiv 2110.06169).

The critics read detached features, so the VLM is moved by the policy alone; the indicator reaches the action expert
alone. Pure functions of the modules in ``Parts`` and a batch; which ranks there are, nobody here knows.

    B batch   F flow draws   H chunk   A action dims   J Q networks
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageScale, choose_indicator, forced_positive
from recap_ds.algo.flow_matching import noisy_action, target_velocity
from recap_ds.algo.iql import advantage as iql_advantage
from recap_ds.algo.iql import extraction_weight, q_loss, td_target, value_loss
from recap_ds.batch import Observation, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.critics import Critic, QNetworks
from recap_ds.models.dit_cross import DiTCrossExpert
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, TrainOutput, count_flow_elements
from recap_ds.models.pixels import augment, to_pixels
from recap_ds.models.sampling import sample_actions
from recap_ds.models.vlm import PrefixFeatures, VisionLanguageModel


class Parts(NamedTuple):
    """What the stage trains and reads; modules of one container."""

    vlm: VisionLanguageModel
    action_expert: DiTCrossExpert
    critic: Critic
    target_critic: QNetworks


class CriticOutput(NamedTuple):
    loss: Tensor  # 0-dim with gradient: weighted sum over the samples with a TD target
    v: Tensor  # [B]
    target_q: Tensor  # [J, B], without gradient
    v_loss: Tensor  # [B], 0 where there is no TD target
    q_loss: Tensor  # [B], likewise
    td_error: Tensor  # [B], mean over heads of Q - target
    target_gap: Tensor  # [B], mean over heads of |Q - Qbar|


def joint_step(
    parts: Parts,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    scale: AdvantageScale,
    normalizers: LossNormalizers,
    warming_up: bool,
    augmented: bool,
) -> TrainOutput:
    """Loss of one micro-batch. ``scale``: thresholds of the step before; ``normalizers``: the whole step's counts."""
    pixels, next_pixels = to_pixels(batch.observation.images), to_pixels(batch.next_observation.images)
    if augmented:
        pixels, next_pixels = augment(pixels, batch.augmentation), augment(next_pixels, batch.augmentation)
    prefix, next_prefix = _encode_both(parts.vlm, batch, pixels, next_pixels)

    critic = _critic_losses(parts, config, batch, prefix, next_prefix)
    advantage = iql_advantage(critic.target_q, critic.v)
    indicator, weight = _extraction(config, batch, advantage, scale, warming_up)
    flow_error = _flow_error(parts.action_expert, batch, prefix, indicator[:, None].expand_as(batch.time))

    policy_sum = (weight * flow_error.sum(dim=1)).sum()
    loss = config.iql.policy_loss_weight * policy_sum / normalizers.flow + critic.loss / normalizers.td
    return TrainOutput(
        loss=loss,
        policy_loss=flow_error.detach().sum(dim=1) / count_flow_elements(batch).clamp(min=1.0),
        q_loss=critic.q_loss.detach(),
        v_loss=critic.v_loss.detach(),
        q=critic.target_q.amin(dim=0),
        v=critic.v.detach(),
        advantage=advantage,
        td_error=critic.td_error,
        target_gap=critic.target_gap,
        weight=weight,
        indicator=indicator,
    )


@torch.no_grad()
def joint_evaluation(parts: Parts, config: PiStarRECAPConfig, batch: TransitionBatch) -> EvaluationOutput:
    """Held-out measures of one batch; draws nothing at random."""
    pixels, next_pixels = to_pixels(batch.observation.images), to_pixels(batch.next_observation.images)
    prefix, next_prefix = _encode_both(parts.vlm, batch, pixels, next_pixels)
    camera_mask = batch.observation.camera_mask.roll(1, dims=0)
    shuffled = parts.vlm(batch.observation._replace(camera_mask=camera_mask), pixels.roll(1, dims=0))
    critic = _critic_losses(parts, config, batch, prefix, next_prefix)
    flow_errors = [
        _flow_error(parts.action_expert, batch, prefix, torch.full_like(batch.time, indicator, dtype=torch.long))
        for indicator in INDICATOR_IDS.values()
    ]
    state, noise = batch.observation.state, batch.noise[:, 0]
    actions = [
        sample_actions(
            parts.action_expert,
            prefix,
            state,
            noise,
            batch.action_dim_mask,
            advantage,
            guidance_beta=1.0,
            num_steps=config.num_inference_steps,
        )
        for advantage in (None if config.recap.policy_extraction == "weighted" else "positive", None)
    ]
    elements = count_flow_elements(batch).clamp(min=1.0)
    return EvaluationOutput(
        flow_loss=torch.stack([error.sum(dim=1) for error in flow_errors], dim=1) / elements[:, None],
        q_loss=critic.q_loss,
        v_loss=critic.v_loss,
        q=critic.target_q.amin(dim=0),
        v=critic.v,
        v_shuffled=parts.critic.v(shuffled, state),
        actions=actions[0],
        unconditioned_actions=actions[1],
    )


def _encode_both(
    vlm: VisionLanguageModel, batch: TransitionBatch, pixels: Tensor, next_pixels: Tensor
) -> tuple[PrefixFeatures, PrefixFeatures]:
    """Prefix of o_t (with gradient where the VLM trains) and of o_{t+k} (never)."""
    now, later = batch.observation, batch.next_observation
    if vlm.trainable:
        prefix = vlm(now, pixels)
        with torch.no_grad():
            return prefix, vlm(later, next_pixels)
    both = Observation(*(torch.cat(pair) for pair in zip(now, later, strict=True)))
    encoded = vlm(both, torch.cat([pixels, next_pixels]))
    first, second = zip(*(part.chunk(2) for part in encoded), strict=True)
    return PrefixFeatures(*first), PrefixFeatures(*second)


def _critic_losses(
    parts: Parts,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    prefix: PrefixFeatures,
    next_prefix: PrefixFeatures,
) -> CriticOutput:
    detached = PrefixFeatures(prefix.hidden.detach(), prefix.mask)
    state, iql = batch.observation.state, config.iql
    v = parts.critic.v(detached, state)
    q = parts.critic.q(detached, state, batch.actions, batch.td_action_valid)
    with torch.no_grad():
        target_q = parts.target_critic(detached, state, batch.actions, batch.td_action_valid)
        next_v = parts.critic.v(next_prefix, batch.next_observation.state)
        bounded = config.value.reward == "sparse_time"
        target = td_target(batch.chunk_reward, batch.chunk_discount, batch.continues, next_v, clip=bounded)
    valid = batch.td_valid.float()
    per_sample_v = value_loss(target_q, v, iql.expectile) * valid
    per_sample_q = q_loss(q, target) * valid
    return CriticOutput(
        loss=iql.v_loss_weight * per_sample_v.sum() + iql.q_loss_weight * per_sample_q.sum(),
        v=v,
        target_q=target_q,
        v_loss=per_sample_v,
        q_loss=per_sample_q,
        td_error=(q.detach().mean(dim=0) - target) * valid,
        target_gap=(q.detach() - target_q).abs().mean(dim=0),
    )


def _extraction(
    config: PiStarRECAPConfig, batch: TransitionBatch, advantage: Tensor, scale: AdvantageScale, warming_up: bool
) -> tuple[Tensor, Tensor]:
    """Indicator [B] and policy weight [B] of every sample: ``recap.policy_extraction``."""
    recap = config.recap
    # From Python numbers: a table made here would be copied to the device, and the host would wait for it.
    source_weight = sum(weight * (batch.source == source) for source, weight in enumerate(recap.source_weights))
    if recap.policy_extraction == "weighted":
        indicator = torch.full_like(batch.task, INDICATOR_IDS["none"])
    else:
        forced = forced_positive(batch.source, recap.demos)
        # k = 0: Q was never asked about this chunk, so its advantage says nothing.
        unknown = ~batch.td_valid | warming_up
        indicator = choose_indicator(advantage, batch.task, forced, batch.indicator_dropped, scale, unknown)
    if recap.policy_extraction == "conditioned":
        return indicator, source_weight
    known = batch.td_valid & (not warming_up)
    exponential = extraction_weight(advantage, config.iql.temperature, scale.sigma[batch.task])
    return indicator, source_weight * torch.where(known, exponential, 1.0)


def _flow_error(expert: DiTCrossExpert, batch: TransitionBatch, prefix: PrefixFeatures, indicator: Tensor) -> Tensor:
    """Squared velocity error [B, F], summed over valid frames and real dims; ``indicator`` [B, F]."""
    mask = (batch.action_valid[:, None, :, None] & batch.action_dim_mask[:, None, None, :]).float()
    actions = batch.actions[:, None]
    x_t = noisy_action(actions, batch.noise, batch.time)
    context = expert.encode_prefix(prefix)
    velocity = expert(context, batch.observation.state, x_t, batch.time, indicator, batch.action_valid)
    return ((velocity - target_velocity(actions, batch.noise)).square() * mask).sum(dim=(2, 3))
