"""Action sampling: Euler integration of the guided velocity field over one encoded prefix.

B batch   F branches: 1, or 2 where a row is guided   H chunk   A action dims
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.flow_matching import euler, guided_velocity
from recap_ds.models.experts import ActionExpert
from recap_ds.models.vlm import PrefixFeatures

AdvantageLevel = Literal["positive", "negative"]
AdvantageName = AdvantageLevel | None


class Guidance(NamedTuple):
    """What every row is told, and how strongly."""

    indicator: Tensor  # [B, F] int64, INDICATOR_IDS; of two branches the first is the unconditional one
    beta: Tensor  # [B] float32


def guidance_of(advantages: Sequence[AdvantageName], betas: Sequence[float], device: torch.device) -> Guidance:
    """One branch where one will do for every row; a row that needs no other has the same one twice, with beta 1."""
    rows = []
    for advantage, beta in zip(advantages, betas, strict=True):
        if advantage is None or beta == 0.0:
            rows.append(("none", "none", 1.0))
        elif beta == 1.0:
            rows.append((advantage, advantage, 1.0))
        else:
            rows.append(("none", advantage, beta))
    branches = 1 if all(first == second for first, second, _ in rows) else 2
    indicator = [[INDICATOR_IDS[name] for name in row[:branches]] for row in rows]
    return Guidance(
        torch.tensor(indicator, device=device),
        torch.tensor([row[2] for row in rows], dtype=torch.float32, device=device),
    )


def sample_actions(
    expert: ActionExpert,
    prefix: PrefixFeatures,
    state: Tensor,
    noise: Tensor,
    action_dim_mask: Tensor,
    advantage: AdvantageName | Sequence[AdvantageName],
    guidance_beta: float | Sequence[float],
    num_steps: int,
) -> Tensor:
    """Actions [B, H, A] from ``noise`` [B, H, A]; ``advantage`` and ``guidance_beta`` for all rows, or one for each.

    v = v_u + guidance_beta (v_c - v_u) (RECAP, Eq. 13). Where a row needs both branches they are two draws of one
    expert pass: the prefix is encoded and projected once. Dims the robot lacks stay zero, as in training.
    """
    context = expert.encode_prefix(prefix)
    noise = noise * action_dim_mask[:, None, :]
    everywhere = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
    rows = len(noise)
    advantages = [advantage] * rows if advantage is None or isinstance(advantage, str) else advantage
    betas = guidance_beta if isinstance(guidance_beta, Sequence) else [guidance_beta] * rows
    indicator, beta = guidance_of(advantages, betas, noise.device)
    branches = indicator.shape[1]

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        x_t, time = x_t[:, None].expand(-1, branches, -1, -1), time[:, None].expand(-1, branches)
        field = expert(context, state, x_t, time, indicator, everywhere) * action_dim_mask[:, None, None, :]
        return field[:, 0] if branches == 1 else guided_velocity(field[:, 0], field[:, 1], beta[:, None, None])

    return euler(velocity, noise, num_steps)
