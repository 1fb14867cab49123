"""Statistics of states and actions that merge: what normalisation is built from.

Count, min and max merge exactly; mean and std by Chan's parallel formula in float64. Quantiles come from a histogram
per dim of at most NUM_BINS bins of width 2**e aligned at multiples of the width, so that merging only ever joins whole
bins: the result does not depend on how the data was split. A quantile is within one bin width of the exact order
statistic, which is under 2 / NUM_BINS of the dim's range. n = rows, D = dims of the feature.
"""

import math

import numpy as np
from pydantic import BaseModel, ConfigDict

NUM_BINS = 1024
# The narrowest bin is 2**-40: float32 values that differ by less are the same value here.
MIN_EXPONENT = -40


class Histogram(BaseModel):
    """Bin i of ``counts`` holds values in [(first_bin + i) * 2**exponent, (first_bin + i + 1) * 2**exponent)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exponent: int
    first_bin: int
    # Space-separated integers: one line of the manifest instead of a thousand.
    counts: str

    @property
    def bin_counts(self) -> np.ndarray:
        return np.array(self.counts.split(), dtype=np.int64)

    @property
    def bin_width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @classmethod
    def of(cls, values: np.ndarray) -> "Histogram":
        """``values`` [n] float64, finite, n > 0."""
        exponent = _exponent_for(float(values.min()), float(values.max()))
        bins = np.floor(np.ldexp(values, -exponent))  # exact: scaling by a power of two
        first = bins.min()
        return cls._from_counts(exponent, int(first), np.bincount((bins - first).astype(np.int64)))

    @classmethod
    def merge(cls, parts: list["Histogram"]) -> "Histogram":
        exponent = max(part.exponent for part in parts)
        while True:
            firsts = [part.first_bin >> (exponent - part.exponent) for part in parts]
            lasts = [(part.first_bin + len(part.bin_counts) - 1) >> (exponent - part.exponent) for part in parts]
            if max(lasts) - min(firsts) < NUM_BINS:
                break
            exponent += 1
        counts = np.zeros(max(lasts) - min(firsts) + 1, dtype=np.int64)
        for part in parts:
            # Python integers: a far-off constant dim has bin numbers beyond int64.
            places = [
                ((part.first_bin + i) >> (exponent - part.exponent)) - min(firsts) for i in range(len(part.bin_counts))
            ]
            np.add.at(counts, places, part.bin_counts)
        return cls._from_counts(exponent, min(firsts), counts)

    @classmethod
    def _from_counts(cls, exponent: int, first_bin: int, counts: np.ndarray) -> "Histogram":
        return cls(exponent=exponent, first_bin=first_bin, counts=" ".join(map(str, counts.tolist())))

    def quantile(self, fraction: float) -> float:
        counts = self.bin_counts
        cumulative = np.cumsum(counts)
        rank = math.floor(fraction * (int(cumulative[-1]) - 1))
        place = int(np.searchsorted(cumulative, rank, side="right"))
        within = (rank - (int(cumulative[place]) - int(counts[place])) + 0.5) / int(counts[place])
        return (self.first_bin + place + within) * self.bin_width


def _exponent_for(low: float, high: float) -> int:
    """Smallest exponent at which [low, high] touches at most NUM_BINS aligned bins."""
    exponent = MIN_EXPONENT
    if high > low:
        # 2**exponent < (high - low) / NUM_BINS: too narrow, but not by much.
        exponent = max(exponent, math.frexp((high - low) / NUM_BINS)[1] - 2)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= NUM_BINS:
        exponent += 1
    return exponent


class FeatureStats(BaseModel):
    """Per dim, over ``count`` rows. std is the population's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    histograms: tuple[Histogram, ...]

    @property
    def num_dims(self) -> int:
        return len(self.mean)

    def quantile(self, fraction: float) -> tuple[float, ...]:
        """Of any fraction in [0, 1], as exact as the histogram's bins."""
        return tuple(
            min(max(part.quantile(fraction), low), high)
            for part, low, high in zip(self.histograms, self.min, self.max, strict=True)
        )

    @classmethod
    def of(cls, values: np.ndarray) -> "FeatureStats":
        """``values`` [n, D], finite, n > 0."""
        values = np.asarray(values, dtype=np.float64)
        assert values.ndim == 2 and len(values) > 0 and np.isfinite(values).all(), values.shape
        return cls._assemble(
            count=len(values),
            mean=values.mean(axis=0),
            std=values.std(axis=0),
            low=values.min(axis=0),
            high=values.max(axis=0),
            histograms=[Histogram.of(column) for column in values.T],
        )

    @classmethod
    def merge(cls, parts: list["FeatureStats"]) -> "FeatureStats":
        """Statistics of all the parts' rows together. At least one part; all of the same dims."""
        assert parts and len({part.num_dims for part in parts}) == 1
        if len(parts) == 1:
            return parts[0]
        counts = np.array([[part.count] for part in parts], dtype=np.float64)
        means, stds = np.array([part.mean for part in parts]), np.array([part.std for part in parts])
        mean = (counts * means).sum(axis=0) / counts.sum()
        squares = (counts * (stds**2 + (means - mean) ** 2)).sum(axis=0)
        return cls._assemble(
            count=sum(part.count for part in parts),
            mean=mean,
            std=np.sqrt(squares / counts.sum()),
            low=np.min([part.min for part in parts], axis=0),
            high=np.max([part.max for part in parts], axis=0),
            histograms=[Histogram.merge(list(column)) for column in zip(*(p.histograms for p in parts), strict=True)],
        )

    @classmethod
    def _assemble(
        cls,
        count: int,
        mean: np.ndarray,
        std: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        histograms: list[Histogram],
    ) -> "FeatureStats":
        def quantiles(fraction: float) -> tuple[float, ...]:
            return tuple(np.clip([part.quantile(fraction) for part in histograms], low, high).tolist())

        return cls(
            count=count,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            min=tuple(low.tolist()),
            max=tuple(high.tolist()),
            q01=quantiles(0.01),
            q99=quantiles(0.99),
            histograms=tuple(histograms),
        )
