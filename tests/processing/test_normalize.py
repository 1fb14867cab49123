import json

import numpy as np
import pytest
import torch

from recap_ds.data.stats import FeatureStats
from recap_ds.processing.normalize import Affine, Normalizer
from tests.data.tiny_shards import flat_episode, tiny_config, write_tiny


def stats_of(values) -> FeatureStats:
    return FeatureStats.of(np.asarray(values, np.float64))


@pytest.fixture
def skewed() -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, [1.0, 30.0], size=(5000, 2))


def test_mean_std(skewed):
    normalised = Affine.of(stats_of(skewed), "mean_std", 2).normalize(skewed.astype(np.float32))
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std(axis=0), 1, atol=1e-4)


def test_quantile_maps_q01_and_q99_to_minus_one_and_one(skewed):
    stats = stats_of(skewed)
    affine = Affine.of(stats, "quantile", 2)
    np.testing.assert_allclose(affine.normalize(np.array(stats.q01, np.float32)), -1, atol=1e-5)
    np.testing.assert_allclose(affine.normalize(np.array(stats.q99, np.float32)), 1, atol=1e-5)
    inside = (np.abs(affine.normalize(skewed.astype(np.float32))) <= 1).mean(axis=0)
    np.testing.assert_allclose(inside, 0.98, atol=0.004)


@pytest.mark.parametrize("method", ["mean_std", "quantile"])
def test_a_dim_that_hardly_moves_is_centred_only(method):
    values = np.stack([np.linspace(-1, 1, 500), 5 + 4e-4 * np.sin(np.arange(500)), np.full(500, -2.0)], axis=1)
    affine = Affine.of(stats_of(values), method, 3)
    np.testing.assert_array_equal(affine.scale[1:], 1.0)
    np.testing.assert_allclose(affine.normalize(values.astype(np.float32))[:, 1:], 0, atol=1e-3)
    assert affine.scale[0] > 0.5


def test_padding_and_the_way_back():
    affine = Affine.of(stats_of([[0.0, 10.0], [4.0, 30.0]]), "mean_std", 5)
    values = np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float32)
    normalised = affine.normalize(values)
    assert normalised.shape == (2, 1, 5)
    np.testing.assert_array_equal(normalised[..., 2:], 0)
    np.testing.assert_allclose(normalised[0, 0, :2], [(1 - 2) / 2, (2 - 20) / 10])
    np.testing.assert_allclose(affine.unnormalize(normalised), values, rtol=1e-6)


def test_torch_equals_numpy_bit_for_bit(skewed):
    affine = Affine.of(stats_of(skewed), "quantile", 4)
    values = skewed[:50].astype(np.float32)
    normalised = affine.normalize(torch.from_numpy(values))
    assert normalised.dtype == torch.float32
    np.testing.assert_array_equal(normalised.numpy(), affine.normalize(values))
    back = affine.unnormalize(normalised)
    np.testing.assert_array_equal(back.numpy(), affine.unnormalize(normalised.numpy()))


def test_json_round_trip_is_exact(skewed):
    stats = stats_of(skewed)
    normalizer = Normalizer("quantile", Affine.of(stats, "quantile", 3), Affine.of(stats, "mean_std", 2))
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert again.method == "quantile" and again.state.width == 3
    for name in ("state", "actions"):
        np.testing.assert_array_equal(getattr(again, name).center, getattr(normalizer, name).center)
        np.testing.assert_array_equal(getattr(again, name).scale, getattr(normalizer, name).scale)
        assert getattr(again, name).scale.dtype == np.float32


def test_statistics_are_those_of_all_sources_together(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 6), flat_episode(3, 10, source="auto")])
    normalizer = Normalizer.of(
        shard_set.manifest.merged_statistics("state"), shard_set.manifest.merged_statistics("actions"), tiny_config()
    )
    actions = np.concatenate([np.arange(6), 30 + np.arange(10)])
    np.testing.assert_allclose(normalizer.actions.center[0], actions.mean(), rtol=1e-6)
    np.testing.assert_allclose(normalizer.actions.scale[0], actions.std(), rtol=1e-6)
    assert normalizer.actions.width == 3 and normalizer.state.width == 4
    assert normalizer.state.scale[2] == 1.0  # the constant dim
