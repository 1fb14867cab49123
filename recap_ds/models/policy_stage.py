"""Stage ``policy``: VLM and action expert on labels from files (RECAP, arXiv 2511.14759, Eq. 3 and 4).

Who is positive was decided once, for the whole data set, by a label job; here the indicator is only dropped for some
samples, which train the unconditional branch of guidance. Without labels (``recap.sft``) every sample is positive.

    B batch
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.iql import extraction_weight
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.action_tokens import with_action_tokens
from recap_ds.models.experts import ActionExpert
from recap_ds.models.flow_losses import evaluate_flow, flow_losses, source_weight
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, TrainOutput
from recap_ds.models.pixels import to_pixels, training_pixels
from recap_ds.models.prefixes import detached
from recap_ds.models.vlm import VisionLanguageModel


class PolicyParts(NamedTuple):
    """What the stage trains and reads; modules of one container."""

    vlm: VisionLanguageModel
    action_expert: ActionExpert


def policy_step(
    parts: PolicyParts,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    sigma: Tensor,
    normalizers: LossNormalizers,
    augmented: bool,
) -> TrainOutput:
    """Loss of one micro-batch. ``sigma`` [K]: the labels' spread of A per task; ``normalizers``: the step's counts."""
    pixels = training_pixels(batch.observation.images, batch.augmentation, augmented)
    prefix = parts.vlm(batch.observation, pixels)
    indicator, weight = _extraction(config, batch, sigma)
    for_policy = detached(prefix) if config.model.stop_gradient else prefix
    flow = flow_losses(parts.action_expert, batch, for_policy, indicator, weight)
    output = TrainOutput(
        loss=config.iql.policy_loss_weight * flow.policy_sum / normalizers.flow,
        policy_loss=flow.policy_loss,
        weight=weight,
        indicator=indicator,
    )
    return with_action_tokens(output, parts.vlm, config, batch, prefix, normalizers)


@torch.no_grad()
def policy_evaluation(parts: PolicyParts, config: PiStarRECAPConfig, batch: TransitionBatch) -> EvaluationOutput:
    """Held-out measures of one batch; draws nothing at random."""
    prefix = parts.vlm(batch.observation, to_pixels(batch.observation.images))
    flow = evaluate_flow(parts.action_expert, config, batch, prefix)
    return EvaluationOutput(
        flow_loss=flow.flow_loss, actions=flow.actions, unconditioned_actions=flow.unconditioned_actions
    )


def _extraction(config: PiStarRECAPConfig, batch: TransitionBatch, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Indicator [B] and policy weight [B] of every sample: ``recap.policy_extraction``."""
    recap, none = config.recap, INDICATOR_IDS["none"]
    weight = source_weight(config, batch)
    if recap.policy_extraction == "weighted":
        indicator = torch.full_like(batch.label_indicator, none)
    else:
        positive = torch.full_like(batch.label_indicator, INDICATOR_IDS["positive"])
        labelled = positive if recap.sft else batch.label_indicator
        indicator = labelled.masked_fill(batch.indicator_dropped, none)
    if recap.policy_extraction != "conditioned":
        weight = weight * extraction_weight(batch.label_advantage, config.iql.temperature, sigma[batch.task])
    return indicator, weight
