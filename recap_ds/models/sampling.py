"""Action sampling: Euler integration of the guided velocity field over one encoded prefix.

B batch   H chunk   A action dims
"""

from typing import Literal

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.flow_matching import euler, guided_velocity
from recap_ds.models.experts import ActionExpert
from recap_ds.models.vlm import PrefixFeatures

AdvantageLevel = Literal["positive", "negative"]
AdvantageName = AdvantageLevel | None


def sample_actions(
    expert: ActionExpert,
    prefix: PrefixFeatures,
    state: Tensor,
    noise: Tensor,
    action_dim_mask: Tensor,
    advantage: AdvantageName,
    guidance_beta: float,
    num_steps: int,
) -> Tensor:
    """Actions [B, H, A] from ``noise`` [B, H, A].

    v = v_u + guidance_beta (v_c - v_u) (RECAP, Eq. 13). Where both branches are needed they are two draws of one expert
    pass: the prefix is encoded and projected once. Dims the robot lacks stay zero, as in training.
    """
    context = expert.encode_prefix(prefix)
    noise = noise * action_dim_mask[:, None, :]
    everywhere = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
    if advantage is None or guidance_beta == 0.0:
        indicators = [INDICATOR_IDS["none"]]
    elif guidance_beta == 1.0:
        indicators = [INDICATOR_IDS[advantage]]
    else:
        indicators = [INDICATOR_IDS["none"], INDICATOR_IDS[advantage]]
    branches = len(indicators)
    indicator = torch.tensor(indicators, device=noise.device).expand(len(noise), -1)

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        x_t, time = x_t[:, None].expand(-1, branches, -1, -1), time[:, None].expand(-1, branches)
        field = expert(context, state, x_t, time, indicator, everywhere) * action_dim_mask[:, None, None, :]
        return field[:, 0] if branches == 1 else guided_velocity(field[:, 0], field[:, 1], guidance_beta)

    return euler(velocity, noise, num_steps)
