"""Rank statistics for value functions: ties share their ranks, and where nothing can be said the answer is None.

N samples.
"""

import numpy as np


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1..N of ``values`` [N]; equal values get the mean of the ranks they span."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[group]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho of [N] and [N] with tied ranks averaged; None where one of them is constant."""
    if len(a) < 2:
        return None
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    spread = np.sqrt((ranks_a**2).sum() * (ranks_b**2).sum())
    return float((ranks_a * ranks_b).sum() / spread) if spread > 0 else None


def separation(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Probability that a random ``positive`` exceeds a random ``negative``, ties counting half (area under ROC)."""
    if not len(positive) or not len(negative):
        return None
    ranks = average_ranks(np.concatenate([positive, negative]))
    below = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2.0
    return float(below / (len(positive) * len(negative)))
