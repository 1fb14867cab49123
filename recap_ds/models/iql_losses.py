"""The IQL critics' losses on encoded observations (arXiv 2110.06169).

Stages joint and critic share them; whether the features carry a gradient, they decide.

    B batch   J Q networks
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.iql import q_loss, td_target, value_loss
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.critics import Critic, QNetworks
from recap_ds.models.vlm import PrefixFeatures


class CriticOutput(NamedTuple):
    loss: Tensor  # 0-dim with gradient: weighted sum over the samples with a TD target
    v: Tensor  # [B]
    target_q: Tensor  # [J, B], without gradient
    v_loss: Tensor  # [B], 0 where there is no TD target
    q_loss: Tensor  # [B], likewise
    td_error: Tensor  # [B], mean over heads of Q - target
    target_gap: Tensor  # [B], mean over heads of |Q - Qbar|


def critic_losses(
    critic: Critic,
    target_critic: QNetworks,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    prefix: PrefixFeatures,
    next_prefix: PrefixFeatures,
) -> CriticOutput:
    """Gradient flows into ``critic``, and into ``prefix`` where that carries one."""
    state, iql = batch.observation.state, config.iql
    v = critic.v(prefix, state)
    q = critic.q(prefix, state, batch.actions, batch.td_action_valid)
    with torch.no_grad():
        target_q = target_critic(prefix, state, batch.actions, batch.td_action_valid)
        next_v = critic.v(next_prefix, batch.next_observation.state)
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
