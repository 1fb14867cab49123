"""Rewards, TD windows and Monte-Carlo returns (RECAP, arXiv 2511.14759, Eq. 1 and 5).

An episode has T frames o_0..o_{T-1} with an action at each; no observation follows the last action. Reward of frame t
is -1; at the last frame it is 0 on success and -failure_cost on failure. Everything is divided by the task's
normaliser, so that values of all tasks lie in about [-1, 0]. Arithmetic is float64, results are float32.

A frame after which a human takes over can cost more (value.takeover_penalty): the last one under the policy's control
pays it, in a window that ends there as in the return of every frame before.

Knows nothing of files, models or where the numbers came from.

    B samples   W stored action width   N tasks   t frame of the sample   g discount per frame   k frames in the window
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS
from recap_ds.config import ValueConfig
from recap_ds.errors import UsageError


class ReturnRule(NamedTuple):
    reward: Literal["sparse_time", "environment"]
    discount: float  # per frame, g
    timeout_is: Literal["failure", "truncated"]  # what outcome "truncated" means


class TaskScale(NamedTuple):
    """Per-task constants, in frames; index them with task ids."""

    max_length: Tensor  # [N] float64, L_task
    failure_cost: Tensor  # [N] float64
    normaliser: Tensor  # [N] float64
    takeover_cost: Tensor  # [N] float64


class TdWindow(NamedTuple):
    steps: Tensor  # [B] int64, k
    valid: Tensor  # [B] bool, False = no TD target exists (k = 0)
    chunk_reward: Tensor  # [B] float32, sum_{i<k} g^i r_{t+i} / normaliser
    chunk_discount: Tensor  # [B] float32, g^k
    continues: Tensor  # [B] float32, 0 only where the task ended inside the window


def value_scale(value: ValueConfig, longest: dict[str, int], tasks: list[str]) -> TaskScale:
    """The constants of every task; ``longest`` is each task's longest episode in the shards."""
    for task, frames in value.max_length.items():
        if task not in tasks:
            raise UsageError(f"value.max_length: unknown task '{task}'; the shards hold {', '.join(map(repr, tasks))}")
        if frames < 1:
            raise UsageError(f"value.max_length.{task}: {frames} is no length; give at least 1 frame")
    lengths = [value.max_length.get(task, longest[task]) for task in tasks]
    max_length = torch.tensor(lengths, dtype=torch.float64)
    failure_cost = max_length.clone() if value.c_fail is None else torch.full_like(max_length, value.c_fail)
    normaliser = max_length + failure_cost if value.normaliser == "max_length_plus_c_fail" else max_length.clone()
    return TaskScale(max_length, failure_cost, normaliser, value.takeover_penalty * max_length)


def td_window(
    steps_to_end: Tensor,
    num_valid: Tensor,
    outcome: Tensor,
    *,
    td_horizon: int,
    rule: ReturnRule,
    failure_cost: Tensor,
    normaliser: Tensor,
    rewards: Tensor | None = None,
    control: Tensor | None = None,
    takeover_cost: Tensor | None = None,
) -> TdWindow:
    """The window a TD target spans: at most ``td_horizon`` frames, never past a change of control or the end.

    ``steps_to_end`` is T-1-t; ``num_valid`` counts frames up to the end or the next change of control; ``rewards``
    [B, W] are the recorded ones, read under rule.reward "environment" only. ``control`` (CONTROL_IDS of the frame) and
    ``takeover_cost`` (frames), together, charge a window that ends in a takeover. All other tensors are [B].
    """
    ended = is_ended(outcome, rule.timeout_is)
    steps, continues = window_steps(steps_to_end, num_valid, ended, td_horizon)

    frames = torch.arange(td_horizon, device=steps.device)  # i
    if rule.reward == "environment":
        assert rewards is not None and rewards.shape[1] >= td_horizon, "the window needs a recorded reward per frame"
        reward = rewards[:, :td_horizon].double()
    else:
        is_last = (frames == steps_to_end[:, None]) & ended[:, None]
        reward = torch.where(is_last, -end_cost(outcome, failure_cost)[:, None], -1.0)
    if takeover_cost is not None:
        assert control is not None, "only the policy's own frames pay for a takeover"
        taken = ends_in_takeover(steps, num_valid, steps_to_end, control)
        pays = taken[:, None] & (frames == steps[:, None] - 1)
        reward = torch.where(pays, reward - takeover_cost.double()[:, None], reward)
    discounts = torch.pow(rule.discount, frames.double())
    # where, not a product: rewards stored past the window are padding and need not be finite.
    chunk_reward = torch.where(frames < steps[:, None], discounts * reward, 0.0).sum(dim=1) / normaliser.double()
    chunk_discount = torch.pow(rule.discount, steps.double())
    return TdWindow(steps, steps > 0, chunk_reward.float(), chunk_discount.float(), continues.float())


def window_steps(steps_to_end: Tensor, num_valid: Tensor, ended: Tensor, td_horizon: int) -> tuple[Tensor, Tensor]:
    """Frames k of each window, and whether the task goes on after it. All [B]; ``ended`` as ``is_ended`` says."""
    steps = num_valid.clamp(max=td_horizon)
    reaches_end = steps == steps_to_end + 1
    # Nothing was observed after the last action. Where the task went on, the last observation there is, o_{T-1}, has to
    # serve as the next one: the window gives up its last frame, and from o_{T-1} itself there is no target.
    return torch.where(reaches_end & ~ended, steps_to_end, steps), ~(reaches_end & ended)


def monte_carlo_return(
    steps_to_end: Tensor,
    outcome: Tensor,
    *,
    timeout_is: Literal["failure", "truncated"],
    failure_cost: Tensor,
    normaliser: Tensor,
    discount: float = 1.0,
    takeover_charge: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sparse_time return from each frame to the end of its episode, clipped to [-1, 0], and where it is known.

    ``takeover_charge`` is what the takeovers ahead cost together, in frames (``takeovers_ahead`` times the cost of
    one). All [B]. The return is not known where the task did not end in the episode (truncated read as such, or
    unknown).
    """
    steps = steps_to_end.double()
    if discount == 1.0:
        frames = steps
    else:  # (1 - g^s) / (1 - g) without cancellation for g close to 1
        frames = torch.expm1(steps * math.log(discount)) / math.expm1(math.log(discount))
    total = -frames - torch.pow(discount, steps) * end_cost(outcome, failure_cost)
    if takeover_charge is not None:
        assert discount == 1.0, "a charge without its frames cannot be discounted"
        total = total - takeover_charge.double()
    return (total / normaliser.double()).clamp(-1.0, 0.0).float(), is_ended(outcome, timeout_is)


def ends_in_takeover(steps: Tensor, num_valid: Tensor, steps_to_end: Tensor, control: Tensor) -> Tensor:
    """[B] bool, True = a human takes over from the policy right after the window of ``steps`` frames."""
    return (control == CONTROL_IDS["policy"]) & (steps == num_valid) & (num_valid <= steps_to_end)


def takeovers_ahead(episode: Tensor, frame: Tensor, num_valid: Tensor, steps_to_end: Tensor, control: Tensor) -> Tensor:
    """How often a human takes over from the policy between each frame and the end of its episode. All [N] int64.

    Over all samples of a data set at once, in any order: a stretch under the policy counts where at least one of its
    frames is a sample, and once however many are.
    """
    episode_length = frame + steps_to_end + 1
    # One number per (episode, frame), ascending in both; a takeover is the number of the human's first frame.
    stride = int(episode_length.max()) + 1 if len(frame) else 1
    position = episode * stride + frame
    taken = ends_in_takeover(num_valid, num_valid, steps_to_end, control)
    takeovers = (position + num_valid)[taken].unique()
    end = position + steps_to_end + 1
    return torch.searchsorted(takeovers, end) - torch.searchsorted(takeovers, position, right=True)


def is_ended(outcome: Tensor, timeout_is: str) -> Tensor:
    """True = the episode's last frame ended the task; False = recording stopped while the task went on."""
    ended = (outcome == OUTCOME_IDS["success"]) | (outcome == OUTCOME_IDS["failure"])
    return ended | (outcome == OUTCOME_IDS["truncated"]) if timeout_is == "failure" else ended


def end_cost(outcome: Tensor, failure_cost: Tensor) -> Tensor:
    return torch.where(outcome == OUTCOME_IDS["success"], 0.0, failure_cost.double())
