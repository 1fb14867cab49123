import numpy as np
import pytest

from recap_ds.data.stats import NUM_BINS, FeatureStats

# Skewed, far from zero, tiny, heavy-tailed, constant, two-valued.
GENERATOR = np.random.default_rng(0)
VALUES = np.stack(
    [
        GENERATOR.exponential(size=4000),
        GENERATOR.normal(1e6, 3.0, size=4000),
        GENERATOR.normal(0.0, 1e-6, size=4000),
        GENERATOR.standard_t(2, size=4000),
        np.full(4000, -3.7e8),
        GENERATOR.integers(0, 2, size=4000).astype(np.float64),
    ],
    axis=1,
)


def test_moments_are_numpys():
    stats = FeatureStats.of(VALUES)
    assert stats.count == 4000
    np.testing.assert_allclose(stats.mean, VALUES.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, VALUES.std(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(stats.min, VALUES.min(axis=0))
    np.testing.assert_array_equal(stats.max, VALUES.max(axis=0))


def test_quantiles_are_within_one_bin_of_the_order_statistic():
    stats = FeatureStats.of(VALUES)
    widths = np.array([histogram.bin_width for histogram in stats.histograms])
    for fraction, quantiles in ((0.01, stats.q01), (0.99, stats.q99)):
        exact = np.quantile(VALUES, fraction, axis=0, method="lower")
        assert (np.abs(quantiles - exact) <= widths).all()
    spread = np.ptp(VALUES, axis=0)
    assert (widths[spread > 0] <= 2 * spread[spread > 0] / NUM_BINS * (1 + 1e-12)).all()
    assert stats.q01[4] == stats.q99[4] == -3.7e8


@pytest.mark.parametrize("cuts", [[1], [7, 100, 3000], list(range(500, 4000, 500))])
def test_merging_parts_is_the_same_as_one_pass(cuts):
    whole = FeatureStats.of(VALUES)
    parts = [FeatureStats.of(part) for part in np.split(VALUES, cuts)]
    for merged in (FeatureStats.merge(parts), FeatureStats.merge([parts[-1], FeatureStats.merge(parts[:-1])])):
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.std, whole.std, rtol=1e-7, atol=1e-6)
        assert merged.histograms == whole.histograms
        assert (merged.count, merged.min, merged.max) == (whole.count, whole.min, whole.max)
        assert (merged.q01, merged.q99) == (whole.q01, whole.q99)


def test_merging_far_apart_constants_keeps_both():
    low, high = FeatureStats.of(np.full((3, 1), -1e30)), FeatureStats.of(np.full((1, 1), 1e-30))
    merged = FeatureStats.merge([low, high])
    assert (merged.min[0], merged.max[0]) == (-1e30, 1e-30)
    assert merged.histograms[0].bin_counts.sum() == 4
    assert merged.mean[0] == pytest.approx(-0.75e30)


def test_json_round_trip_is_exact():
    stats = FeatureStats.of(VALUES)
    assert FeatureStats.model_validate_json(stats.model_dump_json()) == stats
