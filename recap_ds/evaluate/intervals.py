"""How sure a rollout figure is: 95 % intervals of a rate and of a throughput, and an exact test of paired outcomes.

N episodes
"""

import math
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054  # two-sided 95 % of a standard normal
NUM_RESAMPLES = 2000


def wilson_interval(num_successes: int, num_episodes: int) -> tuple[float, float]:
    """Of a success rate (Wilson's score interval): right also near 0 and 1, where the usual +- is not."""
    n, z = num_episodes, Z_95
    rate = num_successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def successes_per_hour(success: np.ndarray, seconds: np.ndarray) -> float:
    """Of episodes [N] played one after another: the time of failures counts."""
    return float(success.sum() / seconds.sum() * 3600.0)


def throughput_interval(success: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Of ``successes_per_hour``: percentiles over episodes drawn again with replacement, from a fixed seed, or Wilson's
    bounds of the rate at the mean time of an episode, whichever reaches further at each end.

    Episodes drawn again know only what was seen: of none that succeeded, or of all, they would make a certainty.
    """
    chosen = np.random.default_rng(0).integers(len(success), size=(NUM_RESAMPLES, len(success)))
    rates = success[chosen].sum(axis=1) / seconds[chosen].sum(axis=1) * 3600.0
    low, high = np.quantile(rates, [0.025, 0.975])
    lowest, highest = (rate / seconds.mean() * 3600.0 for rate in wilson_interval(int(success.sum()), len(success)))
    return float(min(low, lowest)), float(max(high, highest))


class Paired(NamedTuple):
    """Outcomes of the same episodes under two ways to act."""

    both: int
    only_this: int
    only_reference: int
    neither: int
    p_value: float  # of a difference this large or larger where there is none


def compare_paired(this: np.ndarray, reference: np.ndarray) -> Paired:
    """McNemar's test in its exact form [N], [N] bool: of episodes that differ, each side wins with probability 1/2."""
    only_this, only_reference = int((this & ~reference).sum()), int((~this & reference).sum())
    differing, fewer = only_this + only_reference, min(only_this, only_reference)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return Paired(
        both=int((this & reference).sum()),
        only_this=only_this,
        only_reference=only_reference,
        neither=int((~this & ~reference).sum()),
        p_value=min(1.0, 2 * tail),
    )
