"""Value distributions against numbers by hand, scipy-free Gaussians (math.erf) and the gradient of cross-entropy."""

import math

import pytest
import torch

from recap_ds.algo.value_distribution import cross_entropy, expected_value, hl_gauss, quantile, two_hot, value_bins

NUM_BINS = 201


def logits_of(probabilities):
    return torch.tensor(probabilities).log()[None]


def test_bins_are_the_papers():
    bins = value_bins(NUM_BINS)
    assert bins[[0, 100, 200]].tolist() == [-1.0, -0.5, 0.0]
    torch.testing.assert_close(bins.diff(), torch.full((200,), 0.005), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-0.3333, {133: 0.66, 134: 0.34}),
        (-0.0026, {199: 0.52, 200: 0.48}),
        (-0.0024, {199: 0.48, 200: 0.52}),  # the nearest bin is another one than above
        (-1.2, {0: 1.0}),
        (0.4, {200: 1.0}),
        (0.0, {200: 1.0}),
        (-1.0, {0: 1.0}),
        (-0.5, {100: 1.0}),
    ],
)
def test_two_hot_shares_a_value_between_its_neighbours(value, expected):
    (target,) = two_hot(torch.tensor([value], dtype=torch.float64), NUM_BINS)
    found = {index: target[index].item() for index in target.nonzero()[:, 0].tolist()}
    assert found == pytest.approx(expected, abs=1e-6)
    assert target.dtype == torch.float32


@pytest.mark.parametrize("num_bins", [2, 51, NUM_BINS])
def test_the_mean_of_two_hot_is_the_clipped_value(num_bins):
    values = torch.linspace(-1.5, 0.5, 2001)
    target = two_hot(values, num_bins)
    assert (target.count_nonzero(dim=1) <= 2).all()
    torch.testing.assert_close(target.sum(dim=1), torch.ones(2001))
    torch.testing.assert_close(target @ value_bins(num_bins), values.clamp(-1, 0), rtol=0, atol=2e-7)


def test_hl_gauss_is_the_gaussian_integrated_over_each_cell():
    value, sigma = -0.3333, 0.75 * 0.005
    (target,) = hl_gauss(torch.tensor([value], dtype=torch.float64), NUM_BINS)

    def mass(low, high):
        return 0.5 * (math.erf((high - value) / sigma / 2**0.5) - math.erf((low - value) / sigma / 2**0.5))

    expected = [mass(-1 + 0.005 * (b - 0.5), -1 + 0.005 * (b + 0.5)) for b in range(NUM_BINS)]
    torch.testing.assert_close(target, torch.tensor(expected), rtol=1e-6, atol=1e-9)


def test_hl_gauss_is_a_distribution_that_keeps_the_value_away_from_the_ends():
    values = torch.linspace(-1.5, 0.5, 401)
    target = hl_gauss(values, NUM_BINS)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(401))
    error = target @ value_bins(NUM_BINS) - values.clamp(-1, 0)
    inner = (values > -0.98) & (values < -0.02)
    assert error[inner].abs().max() < 2e-5
    assert error.abs().max() < 0.0025  # half a bin, inwards
    assert error[values < -1].min() > 0 > error[values > 0].max()
    # Narrow enough, it is the nearest bin.
    nearest = hl_gauss(torch.tensor([-0.0026, -0.0024], dtype=torch.float64), NUM_BINS, sigma_bins=0.001)
    assert nearest.argmax(dim=1).tolist() == [199, 200]


def test_cross_entropy_is_least_at_the_target_and_pulls_towards_it():
    target = two_hot(torch.tensor([-0.3333, -0.9]), NUM_BINS)
    logits = torch.randn(2, NUM_BINS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = cross_entropy(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(dim=1) - target)

    uniform = cross_entropy(torch.zeros(2, NUM_BINS), target)
    torch.testing.assert_close(uniform, torch.full((2,), math.log(NUM_BINS)))
    entropy = -(0.66 * math.log(0.66) + 0.34 * math.log(0.34))
    assert cross_entropy(target.clamp(min=1e-30).log(), target)[0].item() == pytest.approx(entropy, abs=1e-4)


def test_value_is_read_in_float32_from_bfloat16_logits():
    target = two_hot(torch.tensor([-0.0026]), NUM_BINS)
    logits = torch.randn(4, NUM_BINS, generator=torch.Generator().manual_seed(0)).bfloat16()
    for value in (expected_value(logits), quantile(logits, 0.5), cross_entropy(logits, target)):
        assert value.dtype == torch.float32
    expected = (logits.double().softmax(dim=1) * torch.linspace(-1, 0, NUM_BINS, dtype=torch.float64)).sum(dim=1)
    torch.testing.assert_close(expected_value(logits), expected.float())


def test_quantiles_of_five_bins():
    logits = logits_of([0.1, 0.2, 0.4, 0.2, 0.1])
    levels = [0.05, 0.15, 0.25, 0.5, 0.69, 0.71, 0.95]
    found = [quantile(logits, level).item() for level in levels]
    assert found == [-1.0, -0.75, -0.75, -0.5, -0.5, -0.25, 0.0]
    assert expected_value(logits).item() == pytest.approx(-0.5)


def test_a_quantile_of_certainty_is_that_value():
    logits = torch.full((2, NUM_BINS), -1e4)
    logits[0, 40], logits[1, 200] = 0.0, 0.0
    for level in (1e-6, 0.5, 1 - 1e-6):
        torch.testing.assert_close(quantile(logits, level), torch.tensor([-0.8, 0.0]))


def test_gradient_descent_on_two_outcomes_learns_both_and_their_mean():
    # Half of the episodes end well, half badly: no bin between the two is ever a target.
    logits = torch.zeros(1, NUM_BINS, requires_grad=True)
    target = two_hot(torch.tensor([-0.2, -1.0]), NUM_BINS)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(logits.expand(2, -1), target).mean().backward()
        optimizer.step()
    assert expected_value(logits).item() == pytest.approx(-0.6, abs=0.002)
    assert quantile(logits, 0.25).item() == -1.0
    assert quantile(logits, 0.75).item() == pytest.approx(-0.2)
