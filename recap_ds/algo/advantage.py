"""From advantages to the policy's indicator (RECAP, arXiv 2511.14759, section III and V-B).

A sample is positive where its advantage is strictly above the threshold of ITS task, chosen so that a given fraction of
the task's recent samples is. Samples whose label does not depend on their advantage (forced positive) stay out of that
statistic. Nothing here waits for the device: no value is ever read on the host.

    B, N samples   K tasks   W window (advantages remembered per task)
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.batch import SOURCE_IDS

# Rows of the policy's indicator embedding.
INDICATOR_IDS = {"none": 0, "negative": 1, "positive": 2}

# Advantages are differences of float32 values in [-1, 0]: a spread below this is rounding.
MIN_SIGMA = 1e-6


class AdvantageScale(NamedTuple):
    """What a task's recent advantages say. Neutral until ready: nothing above the threshold, extraction weight 1."""

    # float32 loses nothing: a threshold is one of the float32 advantages held, so `advantage > threshold` is exact.
    threshold: Tensor  # [K] float32, inf until ready
    sigma: Tensor  # [K] float32, standard deviation, at least MIN_SIGMA; inf until ready
    ready: Tensor  # [K] bool, True = enough advantages are held


class AdvantageRing:
    """The last ``window`` advantages of every task, in slot order.

    Float64 and outside every module, so that no engine casts or shards it; the loop checkpoints it.
    """

    def __init__(self, num_tasks: int, window: int, device: torch.device | str) -> None:
        self.window = window
        # One column more than the window: scatter needs somewhere to put what is not kept. It is never read.
        self._values = torch.zeros(num_tasks, window + 1, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_tasks, dtype=torch.int64, device=device)  # ever appended; the ring's write head

    def append(self, advantage: Tensor, task: Tensor, eligible: Tensor, slot: Tensor) -> None:
        """Append the eligible samples of one optimizer step, all ranks' together; the order of the rows is irrelevant.

        All [N]: ``advantage`` float32, ``eligible`` bool with True = counts (not forced positive, not padding, and with
        a TD target: the advantage of a sample without one means nothing).
        """
        assert advantage.dtype == torch.float32, "thresholds are exact for float32 advantages"
        order = slot.argsort()
        advantage, task, eligible = advantage[order], task[order], eligible[order]

        tasks = torch.arange(len(self._counts), device=task.device)
        member = (task[:, None] == tasks) & eligible[:, None]  # [N, K]
        num_new = member.sum(dim=0)
        rank = member.cumsum(dim=0).gather(1, task[:, None])[:, 0] - 1  # place among the step's samples of its task
        # Of more than a window of new samples only the last stay. That also makes every kept position unique: a scatter
        # to one position twice would keep either value.
        kept = eligible & (rank >= num_new[task] - self.window)
        column = torch.where(kept, (self._counts[task] + rank) % self.window, self.window)
        self._values.view(-1).scatter_(0, task * (self.window + 1) + column, advantage.double())
        self._counts += num_new

    def scale(self, positive_fraction: float, minimum: int) -> AdvantageScale:
        """Thresholds with exactly round(positive_fraction * n) of a task's n held advantages above (ties aside)."""
        num_held = self._counts.clamp(max=self.window)
        held = torch.arange(self.window + 1, device=num_held.device) < num_held[:, None]
        ready = num_held >= minimum

        descending = self._values.masked_fill(~held, -torch.inf).sort(dim=1, descending=True).values
        num_positive = (positive_fraction * num_held.double()).round().long()
        threshold = descending.gather(1, num_positive[:, None])[:, 0]

        divisor = num_held.clamp(min=1)
        mean = self._values.masked_fill(~held, 0.0).sum(dim=1) / divisor
        deviation = (self._values - mean[:, None]).masked_fill(~held, 0.0)
        sigma = (deviation.square().sum(dim=1) / divisor).sqrt().clamp(min=MIN_SIGMA)
        return AdvantageScale(
            threshold.masked_fill(~ready, torch.inf).float(), sigma.masked_fill(~ready, torch.inf).float(), ready
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Copies: ``values`` [K, W] float64 in ring order and ``counts`` [K] int64."""
        return {"values": self._values[:, : self.window].clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert state["values"].shape == (len(self._counts), self.window), "ring of other tasks or another window"
        self._values[:, : self.window].copy_(state["values"])
        self._counts.copy_(state["counts"])


def forced_positive(
    source: Tensor, demos: Literal["positive", "labelled"], corrections: Literal["positive", "labelled"] = "positive"
) -> Tensor:
    """[B] bool, True = positive whatever the advantage: demonstrations and corrections unless they are labelled."""
    forced = torch.zeros_like(source, dtype=torch.bool)
    for name, how in (("demo", demos), ("intervention", corrections)):
        if how == "positive":
            forced = forced | (source == SOURCE_IDS[name])
    return forced


def choose_indicator(
    advantage: Tensor,
    task: Tensor,
    forced_positive: Tensor,
    dropped: Tensor,
    scale: AdvantageScale,
    unknown: bool | Tensor,
) -> Tensor:
    """INDICATOR_IDS of each sample, [B] int64.

    ``unknown`` (True = the advantage says nothing; one bool for all or [B]) holds while critics warm up and for a
    sample without a TD target, of which Q never learned. Such a sample, and one whose task is not ready, gets none
    unless it is forced. ``dropped`` ones get none, forced or not: they train the unconditional branch of guidance.
    """
    none, negative, positive = (INDICATOR_IDS[name] for name in ("none", "negative", "positive"))
    labelled = torch.where(advantage > scale.threshold[task], positive, negative)
    known = scale.ready[task] & torch.as_tensor(unknown).logical_not()
    indicator = torch.where(known, labelled, none)
    return indicator.masked_fill(forced_positive, positive).masked_fill(dropped, none)
