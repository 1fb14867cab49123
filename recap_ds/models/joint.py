"""Stage ``joint``: VLM, action expert and IQL critics in one loss (RECAP, arXiv 2511.14759; IQL, arXiv 2110.06169).

The critics read detached features, so the VLM is moved by the policy alone (``model.stop_gradient``: by the critics
alone, or by action tokens alone where it learns them); the indicator reaches the action expert
alone. Pure functions of the modules in ``Parts`` and a batch; which ranks there are, nobody here knows.

    B batch   F flow draws   H chunk   A action dims   J Q networks
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageScale, choose_indicator, forced_positive
from recap_ds.algo.iql import advantage as iql_advantage
from recap_ds.algo.iql import extraction_weight
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.action_tokens import with_action_tokens
from recap_ds.models.critics import Critic, QNetworks
from recap_ds.models.experts import ActionExpert
from recap_ds.models.flow_losses import evaluate_flow, flow_losses, source_weight
from recap_ds.models.iql_losses import critic_losses
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, TrainOutput
from recap_ds.models.pixels import to_pixels, training_pixels
from recap_ds.models.prefixes import detached, encode_both, encode_shuffled
from recap_ds.models.vlm import VisionLanguageModel


class Parts(NamedTuple):
    """What the stage trains and reads; modules of one container."""

    vlm: VisionLanguageModel
    action_expert: ActionExpert
    critic: Critic
    target_critic: QNetworks


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
    pixels = training_pixels(batch.observation.images, batch.augmentation, augmented)
    next_pixels = training_pixels(batch.next_observation.images, batch.augmentation, augmented)
    prefix, next_prefix = encode_both(parts.vlm, batch, pixels, next_pixels)
    for_policy, for_critic = prefix, detached(prefix)
    if config.model.stop_gradient:
        for_policy = for_critic
        if not config.learns_action_tokens:
            for_critic = prefix

    critic = critic_losses(parts.critic, parts.target_critic, config, batch, for_critic, next_prefix)
    advantage = iql_advantage(critic.target_q, critic.v)
    indicator, weight = _extraction(config, batch, advantage, scale, warming_up)
    flow = flow_losses(parts.action_expert, batch, for_policy, indicator, weight)

    loss = config.iql.policy_loss_weight * flow.policy_sum / normalizers.flow + critic.loss / normalizers.td
    output = TrainOutput(
        loss=loss,
        policy_loss=flow.policy_loss,
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
    return with_action_tokens(output, parts.vlm, config, batch, prefix, normalizers)


@torch.no_grad()
def joint_evaluation(parts: Parts, config: PiStarRECAPConfig, batch: TransitionBatch) -> EvaluationOutput:
    """Held-out measures of one batch; draws nothing at random."""
    pixels, next_pixels = to_pixels(batch.observation.images), to_pixels(batch.next_observation.images)
    prefix, next_prefix = encode_both(parts.vlm, batch, pixels, next_pixels)
    shuffled = encode_shuffled(parts.vlm, batch, pixels)
    critic = critic_losses(parts.critic, parts.target_critic, config, batch, prefix, next_prefix)
    flow = evaluate_flow(parts.action_expert, config, batch, prefix)
    return EvaluationOutput(
        flow_loss=flow.flow_loss,
        q_loss=critic.q_loss,
        v_loss=critic.v_loss,
        q=critic.target_q.amin(dim=0),
        v=critic.v,
        v_shuffled=parts.critic.v(shuffled, batch.observation.state),
        actions=flow.actions,
        unconditioned_actions=flow.unconditioned_actions,
    )


def _extraction(
    config: PiStarRECAPConfig, batch: TransitionBatch, advantage: Tensor, scale: AdvantageScale, warming_up: bool
) -> tuple[Tensor, Tensor]:
    """Indicator [B] and policy weight [B] of every sample: ``recap.policy_extraction``."""
    recap = config.recap
    weight = source_weight(config, batch)
    if recap.policy_extraction == "weighted":
        indicator = torch.full_like(batch.task, INDICATOR_IDS["none"])
    else:
        forced = forced_positive(batch.source, recap.demos)
        # k = 0: Q was never asked about this chunk, so its advantage says nothing.
        unknown = ~batch.td_valid | warming_up
        indicator = choose_indicator(advantage, batch.task, forced, batch.indicator_dropped, scale, unknown)
    if recap.policy_extraction == "conditioned":
        return indicator, weight
    known = batch.td_valid & (not warming_up)
    exponential = extraction_weight(advantage, config.iql.temperature, scale.sigma[batch.task])
    return indicator, weight * torch.where(known, exponential, 1.0)
