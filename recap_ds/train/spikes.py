"""Loss spikes: a step whose loss is far above those before it changes no weight.

Robust bound: median + deviations x spread over the last applied steps, the spread being 1.4826 x MAD (a normal
distribution's standard deviation) and at least a hundredth of the median's size.

All of it happens on the device. The loss of a whole step is known before its last backward; where it is a spike that
backward is given NaN, and DeepSpeed, which looks for NaN in any case, skips the step on all ranks. So nobody waits for
a number, and a step that is no spike is the same to the last bit as without the guard.

    W losses remembered, fp64, the same on every rank
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.distributed.reduce import sum_over_ranks, world_size

MAD_TO_DEVIATION = 1.4826
MIN_RELATIVE_SPREAD = 0.01


class SpikeJudgement(NamedTuple):
    """Of one step; on the device."""

    loss: Tensor  # [] over all ranks and micro-batches
    bound: Tensor  # []; inf while too few losses are remembered
    is_spike: Tensor  # [] bool; a loss that is not finite is none: its gradients skip the step by themselves


class SpikeGuard:
    def __init__(self, window: int, min_steps: int, deviations: float, device: torch.device) -> None:
        assert 1 <= min_steps <= window, (min_steps, window)
        self._losses = torch.zeros(window, dtype=torch.float64, device=device)
        self._count = 0  # ever remembered; the ring's place follows
        self._min_steps, self._deviations = min_steps, deviations

    @torch.no_grad()
    def judge(self, losses: list[Tensor]) -> SpikeJudgement:
        """The step whose micro-batches have these losses on this rank. Collective: every rank must call."""
        total = sum_over_ranks(torch.stack([loss.detach().double() for loss in losses]).sum())
        loss = total / (len(losses) * world_size())
        bound = self._bound()
        return SpikeJudgement(loss, bound, loss.isfinite() & (loss > bound))

    def _bound(self) -> Tensor:
        held = self._losses[: min(self._count, len(self._losses))]
        if len(held) < self._min_steps:
            return torch.full((), torch.inf, dtype=torch.float64, device=held.device)
        median = held.median()
        spread = MAD_TO_DEVIATION * (held - median).abs().median()
        return median + self._deviations * torch.maximum(spread, MIN_RELATIVE_SPREAD * median.abs())

    @torch.no_grad()
    def remember(self, judgement: SpikeJudgement) -> None:
        """After an applied step."""
        self._losses[self._count % len(self._losses)] = judgement.loss
        self._count += 1

    def state_dict(self) -> dict[str, Tensor]:
        """``spike_losses`` [up to W], oldest first."""
        return {"spike_losses": torch.roll(self._losses, -self._oldest)[: min(self._count, len(self._losses))].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing is remembered of a run that had no guard; of a longer window, the newest."""
        losses = state.get("spike_losses", self._losses[:0])[-len(self._losses) :]
        self._losses[: len(losses)] = losses.to(self._losses)
        self._count = len(losses)

    @property
    def _oldest(self) -> int:
        return self._count % len(self._losses) if self._count >= len(self._losses) else 0


def poisoned(loss: Tensor, judgement: SpikeJudgement) -> Tensor:
    """``loss``, or NaN where it belongs to a spike: its gradients make every rank skip the step."""
    # Times one where it is none, which changes no bit.
    return loss * torch.where(judgement.is_spike, torch.nan, 1.0).to(loss.dtype)
