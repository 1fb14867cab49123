"""Rank statistics against hand-computed results and against their definitions over all pairs."""

import numpy as np
import pytest

from recap_ds.evaluate.statistics import average_ranks, rank_correlation, separation


def ranks_by_definition(values: np.ndarray) -> np.ndarray:
    """How many are below, plus the middle of those that are equal: over all pairs."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return below + (equal + 1) / 2.0


def test_ranks_by_hand():
    assert average_ranks(np.array([10.0, 30.0, 20.0])).tolist() == [1, 3, 2]
    assert average_ranks(np.array([5.0, 1.0, 5.0, 5.0, 9.0])).tolist() == [3, 1, 3, 3, 5]
    assert average_ranks(np.zeros(4)).tolist() == [2.5] * 4


def test_correlation_by_hand():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1.0), "any rising function orders alike"
    assert rank_correlation(a, -(a**3)) == pytest.approx(-1.0)
    # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 1, 1, 0, 0
    assert rank_correlation(a, np.array([2.0, 1.0, 3.0, 4.0])) == pytest.approx(1.0 - 6 * 2 / (4 * 15))
    # With ties: ranks 1.5 1.5 3.5 3.5 against 1 2 3 4; Pearson's of those is 4 / sqrt(4 * 5).
    assert rank_correlation(np.array([0.0, 0.0, 7.0, 7.0]), a) == pytest.approx(4.0 / np.sqrt(20.0))


def test_separation_by_hand():
    assert separation(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert separation(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert separation(np.array([2.0]), np.array([2.0, 2.0])) == 0.5
    # Of four pairs (1,1) ties, (1,2) loses, (3,1) and (3,2) win.
    assert separation(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(2.5 / 4)


def test_where_nothing_can_be_said_the_answer_is_none():
    some, none = np.array([1.0, 2.0]), np.empty(0)
    assert rank_correlation(none, none) is None
    assert rank_correlation(some[:1], some[:1]) is None
    assert rank_correlation(some, np.ones(2)) is None and rank_correlation(np.ones(2), some) is None
    assert separation(some, none) is None and separation(none, some) is None


@pytest.mark.parametrize("num_levels", [3, 20, 10**6])  # many ties, some, none
def test_statistics_equal_their_definitions(num_levels):
    generator = np.random.default_rng(num_levels)
    a, b = generator.integers(0, num_levels, (2, 60)).astype(float)
    assert average_ranks(a).tolist() == ranks_by_definition(a).tolist()
    expected = np.corrcoef(ranks_by_definition(a), ranks_by_definition(b))[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected)
    wins = (a[:25, None] > b[None]).mean() + 0.5 * (a[:25, None] == b[None]).mean()
    assert separation(a[:25], b) == pytest.approx(wins)
