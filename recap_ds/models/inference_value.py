"""What a trained critic says of observations, and of the actions taken there: the model's part of a label job.

B batch   H chunk   A action dims
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.iql import advantage as iql_advantage
from recap_ds.algo.value_distribution import expected_value
from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy


class PredictedValues(NamedTuple):
    value: Tensor  # [B] float32
    # [B] float32, min_j Qbar_j - V; means nothing where the TD window is empty. None of a distributional critic.
    advantage: Tensor | None


@torch.no_grad()
def predict_values(
    policy: PiStarRECAPPolicy,
    observation: Observation,
    actions: Tensor | None = None,
    td_action_valid: Tensor | None = None,
) -> PredictedValues:
    """V(o) of a policy in eval mode; with ``actions`` [B, H, A] and their TD window [B, H] also an IQL advantage.

    Row by row: what else is in the batch changes nothing but the last bits of floating point.
    """
    assert not policy.training, "values are those of eval mode"
    heads, critic = dict(policy.named_children()), policy.config.value.critic
    needed = {"critic"} if critic == "distributional" else {"critic", "target_critic"}
    if missing := sorted(needed - heads.keys()):
        raise UsageError(f"--checkpoint: has no {missing[0]}; take a run of stage critic or joint, with its critics")
    prefix = policy.vlm(observation, to_pixels(observation.images))
    value = policy.critic.v(prefix, observation.state)
    if critic == "distributional":
        return PredictedValues(expected_value(value), None)
    if actions is None:
        return PredictedValues(value, None)
    target_q = policy.target_critic(prefix, observation.state, actions, td_action_valid)
    return PredictedValues(value, iql_advantage(target_q, value))
