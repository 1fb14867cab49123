"""Calibration groups and histograms against hand-computed ones."""

import numpy as np
import pytest

from recap_ds.evaluate.distributions import NUM_BARS, NUM_GROUPS, calibration, histogram, histograms_by_task


def test_calibration_compares_means_of_equal_groups():
    values = np.arange(100.0)[::-1]
    groups = calibration(values, values**2)
    assert len(groups) == NUM_GROUPS and [group["num_samples"] for group in groups] == [10] * NUM_GROUPS
    assert [group["mean_value"] for group in groups] == [4.5 + 10 * n for n in range(10)]
    squares = [(np.arange(10 * n, 10 * n + 10) ** 2).mean() for n in range(10)]
    assert [group["mean_return"] for group in groups] == pytest.approx(squares)


def test_equal_values_share_a_group():
    (group,) = calibration(np.full(30, -0.5), np.linspace(-1.0, 0.0, 30))
    assert group == {"mean_value": -0.5, "mean_return": pytest.approx(-0.5), "num_samples": 30}
    two = calibration(np.repeat([0.0, 1.0], [3, 17]), np.repeat([5.0, 7.0], [3, 17]))
    assert [(group["mean_return"], group["num_samples"]) for group in two] == [(5.0, 3), (7.0, 17)]
    assert calibration(np.empty(0), np.empty(0)) is None


def test_the_outermost_bars_hold_what_lies_outside():
    counted = histogram(np.array([-9.0, 0.0, 0.26, 0.26, 9.0]), 0.0, 1.0)
    counts = counted["counts"]
    assert (counted["low"], counted["high"], len(counts)) == (0.0, 1.0, NUM_BARS)
    assert (counts[0], counts[10], counts[-1], sum(counts)) == (2, 2, 1, 5)
    assert sum(histogram(np.full(7, 3.0), 3.0, 3.0)["counts"]) == 7


def test_sources_of_a_task_share_its_range():
    generator = np.random.default_rng(0)
    values, task, source = generator.normal(size=600), np.repeat([0, 2], 300), np.arange(600) % 2
    found = histograms_by_task(values, task, source, ["a", "b", "c"])
    assert list(found) == ["a", "c"] and list(found["a"]) == ["demo", "auto"]
    for number, name in ((0, "a"), (2, "c")):
        parts = list(found[name].values())
        assert parts[0]["low"] == parts[1]["low"] == pytest.approx(np.quantile(values[task == number], 0.005))
        assert sum(sum(part["counts"]) for part in parts) == 300
