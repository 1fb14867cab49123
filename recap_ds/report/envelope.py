"""Long curves in few points, of which none is lost to the eye: per bucket of steps the mean, the lowest, the highest.

n points   b buckets
"""

from typing import NamedTuple

import numpy as np

NUM_BUCKETS = 160
HUGE = 1e100  # beyond, a diverged value is drawn as this: sums and axes must stay finite


class Envelope(NamedTuple):
    x: np.ndarray  # [b] float64
    middle: np.ndarray  # [b] mean of the known values, NaN where there are none
    low: np.ndarray | None  # [b]; None = every point is there by itself
    high: np.ndarray | None


def drawable(y: np.ndarray) -> np.ndarray:
    """NaN for what is not finite, and nothing beyond HUGE."""
    return np.clip(np.where(np.isfinite(y), y, np.nan), -HUGE, HUGE)


def envelope(x: np.ndarray, y: np.ndarray, num_buckets: int = NUM_BUCKETS) -> Envelope:
    """Of a curve [n], [n] with rising ``x``; NaN is a value that is not known."""
    x, y = np.asarray(x, np.float64), drawable(y)
    if len(x) <= 2 * num_buckets:
        return Envelope(x, y, None, None)
    bucket = ((x - x[0]) / (x[-1] - x[0]) * num_buckets).astype(np.int64).clip(max=num_buckets - 1)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    known = np.add.reduceat(np.isfinite(y).astype(np.float64), starts)
    total = np.add.reduceat(np.nan_to_num(y, nan=0.0), starts)
    middle = np.where(known > 0, total / np.maximum(known, 1.0), np.nan)
    centre = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))
    return Envelope(centre, middle, np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts))
