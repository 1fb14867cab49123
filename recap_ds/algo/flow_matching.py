"""Flow matching in openpi's convention: time 1 is noise, time 0 is the action.

Pure functions; drawing the noise and the time is the loader's business, the velocity is a model's.

    B samples   F flow draws per sample   H chunk   A action dims
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Time 0, the action itself, is never trained on: the noise left there is too little to learn from.
MIN_TIME = 0.001


def flow_time(uniform: Tensor) -> Tensor:
    """Beta(1.5, 1) * 0.999 + 0.001 from uniform draws in [0, 1), by the inverse of its distribution t^1.5."""
    return uniform ** (2.0 / 3.0) * (1.0 - MIN_TIME) + MIN_TIME


def noisy_action(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = t * noise + (1 - t) * actions. ``actions`` [B, 1 or F, H, A], ``noise`` [B, F, H, A], ``time`` [B, F]."""
    time = time[..., None, None]
    return time * noise + (1.0 - time) * actions


def target_velocity(actions: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt, the same at every time."""
    return noise - actions


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Integrate from noise (time 1) to the action (time 0).

    ``noise`` [..., H, A]; velocity(x_t, time) -> like x_t, with time [...].
    """
    x = noise
    for step in range(num_steps):
        # From integers, not by adding up: ten times -0.1 in float32 does not end at 0.
        time = torch.full(noise.shape[:-2], (num_steps - step) / num_steps, dtype=noise.dtype, device=noise.device)
        x = x - velocity(x, time) / num_steps
    return x


def guided_velocity(unconditional: Tensor, conditional: Tensor, guidance_beta: Tensor) -> Tensor:
    """v_u + guidance_beta * (v_c - v_u) (RECAP, Eq. 13); above 1 it leans further towards the conditional branch.

    ``guidance_beta`` broadcasts: every sample may have its own.
    """
    guided = unconditional + guidance_beta * (conditional - unconditional)
    # Exact at the ends: u + (c - u) rounds, and beta 1 has to be the plain conditional policy bit for bit.
    guided = torch.where(guidance_beta == 1.0, conditional, guided)
    return torch.where(guidance_beta == 0.0, unconditional, guided)
