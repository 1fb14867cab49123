"""The bound beside numpy's, what it remembers, and that only a spike changes anything."""

import math

import numpy as np
import pytest
import torch

from recap_ds.train.spikes import SpikeGuard, poisoned

CPU = torch.device("cpu")


def guard_of(window: int = 8, min_steps: int = 4, deviations: float = 5.0) -> SpikeGuard:
    return SpikeGuard(window, min_steps, deviations, CPU)


def feed(guard: SpikeGuard, losses: list[float]) -> list[bool]:
    """Steps with these losses; spikes are not remembered, as steps that were not applied."""
    spikes = []
    for loss in losses:
        judged = guard.judge([torch.tensor(loss, dtype=torch.float64)])
        spikes.append(bool(judged.is_spike))
        if not spikes[-1] and math.isfinite(loss):
            guard.remember(judged)
    return spikes


def test_the_bound_is_the_median_and_robust_deviations_of_the_window():
    guard, generator = guard_of(window=7), np.random.default_rng(0)
    losses = (2.0 + generator.normal(size=30) * 0.1).tolist()
    assert not any(feed(guard, losses))
    window = np.array(losses[-7:])
    median = np.median(window)
    bound = median + 5.0 * 1.4826 * np.median(np.abs(window - median))
    assert guard.judge([torch.tensor(1.0)]).bound.item() == pytest.approx(bound, rel=1e-12)


def test_a_spike_is_judged_over_all_micro_batches():
    guard = guard_of()
    feed(guard, [0.8, 1.0, 1.1, 1.3, 0.9])
    halves = [torch.tensor(1.0), torch.tensor(9.0)]
    judged = guard.judge(halves)
    assert judged.loss.item() == 5.0 and bool(judged.is_spike)
    assert not bool(guard.judge([torch.tensor(1.0), torch.tensor(1.2)]).is_spike)


def test_nothing_is_a_spike_until_enough_is_remembered():
    assert feed(guard_of(min_steps=4), [1.0, 50.0, 1.0, 1.0, 50.0, 1.0]) == [False] * 4 + [True, False]


def test_equal_losses_leave_room():
    guard = guard_of(deviations=5.0)
    feed(guard, [2.0] * 8)
    # The spread is at least a hundredth of the median: 2 + 5 * 0.02.
    assert feed(guard, [2.09, 2.11]) == [False, True]


def test_what_is_not_finite():
    guard = guard_of()
    feed(guard, [1.0] * 4)
    assert feed(guard, [math.nan, math.inf, -math.inf]) == [False] * 3, "their gradients skip the step by themselves"


def test_a_resumed_guard_decides_the_same():
    losses = np.random.default_rng(1).gamma(2.0, size=40).tolist()
    for cut in (0, 3, 8, 21):
        first, second = guard_of(), guard_of()
        feed(first, losses[:cut])
        second.load_state_dict(first.state_dict())
        assert feed(first, losses[cut:]) == feed(second, losses[cut:])
        assert first.state_dict()["spike_losses"].equal(second.state_dict()["spike_losses"])


def test_another_window_takes_the_newest_and_a_run_without_a_guard_gives_none():
    guard, shorter = guard_of(window=8), guard_of(window=4)
    feed(guard, [1.0, 1.1, 1.2, 1.3, 1.0, 1.1, 1.2, 1.3, 1.25])
    shorter.load_state_dict(guard.state_dict())
    assert shorter.state_dict()["spike_losses"].tolist() == [1.1, 1.2, 1.3, 1.25]
    shorter.load_state_dict({})
    assert len(shorter.state_dict()["spike_losses"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_spike_changes_the_gradient(dtype):
    guard = guard_of()
    feed(guard, [1.0] * 4)
    gradients = []
    for step_loss in (None, 1.0, 100.0):
        weight = torch.tensor([0.3, -1.7], dtype=dtype, requires_grad=True)
        loss = (weight * torch.tensor([1.3, 0.7], dtype=dtype)).square().sum()
        if step_loss is not None:
            loss = poisoned(loss, guard.judge([torch.tensor(step_loss)]))
        loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].equal(gradients[1])
    assert gradients[2].isnan().all()
