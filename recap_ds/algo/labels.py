"""Advantages of whole data sets, and who is positive by them (RECAP, arXiv 2511.14759, section III and V-B).

    A_t = clip(sum_{i<n} r_{t+i} + V(o_{t+n}), -1, 0) - V(o_t),   n = min(N, frames to the end, to a change of control)

Beyond a change of control somebody else earned the value, not this action. Values are normalised and undiscounted, as
the Monte-Carlo returns they were learned from. Arithmetic is float64, results are float32.

Where the frame t + n is found, and which samples are forced, is the caller's business: rows are independent of each
other except in ``top_fraction`` and ``advantage_spread``.

    B samples   K tasks   t frame of the sample   N lookahead   n frames looked ahead   T frames of the episode
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import MIN_SIGMA
from recap_ds.algo.returns import end_cost, ends_in_takeover, is_ended


class Lookahead(NamedTuple):
    steps: Tensor  # [B] int64, n: the value that follows is that of frame t + n
    continues: Tensor  # [B] bool, False = the task ended inside the window and no value follows
    takeover: Tensor  # [B] bool, True = a human takes over at frame t + n
    valid: Tensor  # [B] bool, False = there is nothing to look at (n = 0)


def lookahead_window(
    steps_to_end: Tensor,
    num_valid: Tensor,
    outcome: Tensor,
    control: Tensor,
    *,
    lookahead: int | None,
    timeout_is: Literal["failure", "truncated"],
    steps_to_last_value: Tensor | None = None,
) -> Lookahead:
    """How far each sample looks ahead; ``lookahead`` None is to the end of the episode. All [B].

    Where the task went on after the recording, the window ends at the last frame that has a value:
    ``steps_to_last_value`` away, o_{T-1} unless it says otherwise (samples that are not taken at every frame).
    """
    steps = num_valid if lookahead is None else num_valid.clamp(max=lookahead)
    reaches_end = steps == steps_to_end + 1
    ended = is_ended(outcome, timeout_is)
    last = steps_to_end if steps_to_last_value is None else steps_to_last_value
    steps = torch.where(ended, steps, torch.minimum(steps, last))
    takeover = ends_in_takeover(steps, num_valid, steps_to_end, control)
    return Lookahead(steps, ~(reaches_end & ended), takeover, steps > 0)


def sparse_time_reward(
    window: Lookahead, outcome: Tensor, *, failure_cost: Tensor, takeover_cost: Tensor, normaliser: Tensor
) -> Tensor:
    """sum_{i<n} r_{t+i} / normaliser in closed form, for any n. The costs are in frames. All [B]; float64."""
    # A frame costs 1; the task's last one costs what its outcome does instead.
    total = -(window.steps - (~window.continues).long()).double()
    total = total - torch.where(window.continues, 0.0, end_cost(outcome, failure_cost))
    total = total - torch.where(window.takeover, takeover_cost.double(), 0.0)
    return total / normaliser.double()


def n_step_advantage(window_reward: Tensor, continues: Tensor, next_value: Tensor, value: Tensor) -> Tensor:
    """clip(window_reward + V(o_{t+n}), -1, 0) - V(o_t). ``next_value`` is not read where not ``continues``. All [B].

    In a window to the end of a task that ended this is the Monte-Carlo advantage R_t - V(o_t).
    """
    target = window_reward.double() + torch.where(continues, next_value.double(), 0.0)
    return (target.clamp(-1.0, 0.0) - value.double()).float()


def num_positive(num_samples: int, fraction: float) -> int:
    """How many of a task's samples are positive: ``fraction`` of them, rounded; halves to the even number."""
    return round(fraction * num_samples)


def top_fraction(advantage: Tensor, key: Tensor, task: Tensor, eligible: Tensor, fraction: float) -> Tensor:
    """[B] bool, True = among the ``num_positive`` highest advantages of the eligible samples of its task.

    Ranked by (advantage descending, key ascending): equal advantages, which a threshold could only take all or none
    of, part by ``key`` [B] int64, unique. So the number is exact and the order of rows says nothing.
    """
    assert not advantage[eligible].isnan().any(), "an advantage that is no number has no rank"
    positive = torch.zeros_like(eligible)
    for number in task[eligible].unique().tolist():
        rows = torch.nonzero(eligible & (task == number))[:, 0]
        # Two stable sorts, the lesser key first.
        rows = rows[key[rows].argsort(stable=True)]
        rows = rows[advantage[rows].argsort(descending=True, stable=True)]
        positive[rows[: num_positive(len(rows), fraction)]] = True
    return positive


def advantage_spread(advantage: Tensor, task: Tensor, eligible: Tensor, num_tasks: int) -> Tensor:
    """Standard deviation of the eligible advantages of every task, as extraction weights divide by. [K] float32.

    Inf, which makes every weight 1, for a task without any.
    """
    sigma = torch.full((num_tasks,), torch.inf, dtype=torch.float64)
    for number in task[eligible].unique().tolist():
        sigma[number] = advantage[eligible & (task == number)].double().std(correction=0).clamp(min=MIN_SIGMA)
    return sigma.float()
