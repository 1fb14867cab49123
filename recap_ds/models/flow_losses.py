"""The action expert's loss and held-out measures on an encoded observation.

Stages joint and policy share them; where an indicator or a weight comes from, they decide.

    B batch   F flow draws   H chunk   A action dims
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.flow_matching import noisy_action, target_velocity
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.experts import ActionExpert
from recap_ds.models.losses import count_flow_elements
from recap_ds.models.sampling import sample_actions
from recap_ds.models.vlm import PrefixFeatures


class FlowOutput(NamedTuple):
    policy_sum: Tensor  # 0-dim with gradient: weighted sum over valid action elements
    policy_loss: Tensor  # [B], mean over the sample's valid elements, without gradient


class FlowEvaluation(NamedTuple):
    flow_loss: Tensor  # [B, 3], by INDICATOR_IDS
    actions: Tensor  # [B, H, A], as the policy acts
    unconditioned_actions: Tensor  # [B, H, A], from the same noise


def flow_losses(
    expert: ActionExpert, batch: TransitionBatch, prefix: PrefixFeatures, indicator: Tensor, weight: Tensor
) -> FlowOutput:
    """``indicator`` and ``weight`` [B]."""
    error = _flow_error(expert, batch, prefix, indicator[:, None].expand_as(batch.time))
    policy_sum = (weight * error.sum(dim=1)).sum()
    return FlowOutput(policy_sum, error.detach().sum(dim=1) / count_flow_elements(batch).clamp(min=1.0))


def evaluate_flow(
    expert: ActionExpert, config: PiStarRECAPConfig, batch: TransitionBatch, prefix: PrefixFeatures
) -> FlowEvaluation:
    flow_errors = [
        _flow_error(expert, batch, prefix, torch.full_like(batch.time, indicator, dtype=torch.long))
        for indicator in INDICATOR_IDS.values()
    ]
    state, noise = batch.observation.state, batch.noise[:, 0]
    actions = [
        sample_actions(
            expert,
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
    flow_loss = torch.stack([error.sum(dim=1) for error in flow_errors], dim=1) / elements[:, None]
    return FlowEvaluation(flow_loss, *actions)


def source_weight(config: PiStarRECAPConfig, batch: TransitionBatch) -> Tensor:
    """[B]: ``recap.*_weight`` of each sample."""
    # From Python numbers: a table made here would be copied to the device, and the host would wait for it.
    return sum(weight * (batch.source == source) for source, weight in enumerate(config.recap.source_weights))


def _flow_error(expert: ActionExpert, batch: TransitionBatch, prefix: PrefixFeatures, indicator: Tensor) -> Tensor:
    """Squared velocity error [B, F], summed over valid frames and real dims; ``indicator`` [B, F]."""
    mask = (batch.action_valid[:, None, :, None] & batch.action_dim_mask[:, None, None, :]).float()
    actions = batch.actions[:, None]
    x_t = noisy_action(actions, batch.noise, batch.time)
    context = expert.encode_prefix(prefix)
    velocity = expert(context, batch.observation.state, x_t, batch.time, indicator, batch.action_valid)
    return ((velocity - target_velocity(actions, batch.noise)).square() * mask).sum(dim=(2, 3))
