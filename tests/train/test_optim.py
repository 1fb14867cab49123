"""The learning-rate schedule at its corners, in closed form."""

import math

import pytest

from recap_ds.config import TrainingConfig
from recap_ds.train.optim import learning_rate_factor, set_learning_rates


def schedule(steps: int, warmup: int, floor: float = 0.1) -> list[float]:
    training = TrainingConfig(num_training_steps=steps, num_warmup_steps=warmup, final_learning_rate_fraction=floor)
    return [learning_rate_factor(step, training) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_from_above_zero_to_the_peak():
    factors = schedule(steps=20, warmup=4)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == factors[4] == 1.0


def test_the_cosine_falls_from_the_peak_to_the_final_fraction():
    factors = schedule(steps=21, warmup=0, floor=0.2)
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    assert factors[10] == pytest.approx(0.6), "half way between peak and floor in the middle"
    assert factors[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0, [1.0]), (2, 0, [1.0, 0.1]), (2, 1, [0.5, 1.0])])
def test_the_shortest_runs(steps, warmup, expected):
    assert schedule(steps, warmup) == pytest.approx(expected)


def test_without_decay_the_rate_stays():
    assert schedule(steps=6, warmup=2, floor=1.0) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_every_group_moves_by_the_same_factor_whatever_it_was_at():
    groups = [{"name": "vlm", "lr": 7.0}, {"name": "critic", "lr": 0.0}]
    for _ in range(2):  # the rate follows from the peak, not from the rate before: a resumed run has none
        set_learning_rates(groups, {"critic": 3e-4, "vlm": 1e-5}, 0.5)
        assert [group["lr"] for group in groups] == pytest.approx([5e-6, 1.5e-4])
