import math

import numpy as np
import pytest

from recap_ds.evaluate.intervals import (
    Z_95,
    Paired,
    compare_paired,
    successes_per_hour,
    throughput_interval,
    wilson_interval,
)


def flags(text):
    return np.array([letter == "1" for letter in text])


@pytest.mark.parametrize(("successes", "episodes"), [(0, 20), (7, 20), (10, 20), (20, 20), (45, 50)])
def test_wilson_bounds_are_where_the_score_test_turns(successes, episodes):
    """The defining equation: at a bound the observed rate is Z standard errors OF THAT BOUND away."""
    rate = successes / episodes
    for bound in wilson_interval(successes, episodes):
        assert 0.0 <= bound <= 1.0
        if 0.0 < bound < 1.0:
            error = math.sqrt(bound * (1 - bound) / episodes)
            assert abs(rate - bound) == pytest.approx(Z_95 * error, rel=1e-9)


def test_wilson_against_published_figures():
    # Newcombe 1998, table I, score interval of 81 of 263 and 0 of 20.
    np.testing.assert_allclose(wilson_interval(81, 263), [0.2553, 0.3662], atol=5e-5)
    np.testing.assert_allclose(wilson_interval(0, 20), [0.0, 0.1611], atol=5e-5)


def test_throughput_counts_the_time_of_failures():
    # Two successes of 10 s and one failure of 40 s: 2 in a minute.
    assert successes_per_hour(flags("110"), np.array([10.0, 10.0, 40.0])) == pytest.approx(120.0)
    assert successes_per_hour(flags("000"), np.ones(3)) == 0.0


def test_the_throughput_interval_is_that_of_the_mean_where_episodes_are_equally_long():
    success = flags("10" * 200)
    low, high = throughput_interval(success, np.full(400, 36.0))
    spread = Z_95 * 100.0 * math.sqrt(0.25 / 400)  # at rate p there are 100 p successes an hour
    assert low == pytest.approx(50.0 - spread, abs=0.6) and high == pytest.approx(50.0 + spread, abs=0.6)
    assert throughput_interval(success, np.full(400, 36.0)) == (low, high)


@pytest.mark.parametrize("num_successes", [0, 1, 50])
def test_the_throughput_interval_is_no_certainty_at_its_ends(num_successes):
    """Equally long episodes: successes per hour are a hundred times the rate, its bounds a hundred times Wilson's."""
    success = np.arange(50) < num_successes
    low, high = throughput_interval(success, np.full(50, 36.0))
    slow, fast = wilson_interval(num_successes, 50)
    assert low == pytest.approx(100 * (slow if num_successes == 50 else 0.0)) and high == pytest.approx(100 * fast)


def test_the_throughput_interval_is_wider_than_wilson_s_where_lengths_differ():
    """Failures of 100 s among successes of 10 s: another rate means another mean time as well."""
    success = flags("10" * 50)
    seconds = np.where(success, 10.0, 100.0)
    low, high = throughput_interval(success, seconds)
    slow, fast = (rate / 55.0 * 3600.0 for rate in wilson_interval(50, 100))
    assert low < slow and high > fast


@pytest.mark.parametrize(
    ("this", "reference", "expected"),
    [
        ("1100", "1100", Paired(2, 0, 0, 2, 1.0)),
        ("1111", "0000", Paired(0, 4, 0, 0, 2 / 16)),
        ("0000011111", "1000000000", Paired(0, 5, 1, 4, 2 * (1 + 6) / 64)),
        ("10", "01", Paired(0, 1, 1, 0, 1.0)),
    ],
)
def test_paired_outcomes(this, reference, expected):
    assert compare_paired(flags(this), flags(reference)) == pytest.approx(expected)
    assert compare_paired(flags(reference), flags(this)).p_value == pytest.approx(expected.p_value)
