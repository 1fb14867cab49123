"""Values so far from the rest that normalisation by them would flatten everything else: a glitch of one sensor, mostly.

They are stored as they are, for they may be true; the import says where they stand. n = samples, D = dims.
"""

from collections.abc import Sequence

import numpy as np

from recap_ds.data.intake import Take

# Of the distance between the 1st and 99th percentile. Beyond it the statistics' quantiles grow coarse as well.
MAX_SPREADS = 100.0
# A dim that moves less is centred only, whatever it reaches.
MIN_SPREAD = 1e-3
MAX_REPORTED = 5


def find_outliers(takes: Sequence[Take]) -> list[str]:
    """The worst value of each dim that has one, in words; the first few."""
    owner = np.repeat(np.arange(len(takes)), [len(take.windows.frame) for take in takes])
    frame = np.concatenate([take.windows.frame for take in takes])
    found = []
    for feature in ("states", "actions"):
        values = np.concatenate([getattr(take.arrays, feature)[take.windows.frame] for take in takes])
        for dim, column in enumerate(values.T):
            low, high = np.quantile(column, (0.01, 0.99))
            beyond = np.maximum(low - column, column - high)
            worst = int(beyond.argmax())
            if high - low >= MIN_SPREAD and beyond[worst] > MAX_SPREADS * (high - low):
                found.append(
                    f"episode {takes[owner[worst]].episode.name}, frame {frame[worst]}: {feature.removesuffix('s')}"
                    f"[{dim}] is {column[worst]:.4g}, 98 % of the values lie from {low:.4g} to {high:.4g}"
                )
    return found[:MAX_REPORTED]
