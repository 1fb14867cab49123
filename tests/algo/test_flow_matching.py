"""Flow matching against openpi's constants and closed forms of Euler's method."""

import pytest
import torch

from recap_ds.algo.flow_matching import euler, flow_time, guided_velocity, noisy_action, target_velocity


def test_flow_time_has_the_moments_and_quantiles_of_the_beta_distribution():
    num = 100_000
    time = flow_time((torch.arange(num, dtype=torch.float64) + 0.5) / num)  # midpoints: the integral of the quantile
    assert time.mean().item() == pytest.approx(0.999 * 0.6 + 0.001, abs=1e-6)
    beta = (time - 0.001) / 0.999
    assert beta.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=1e-5)
    assert flow_time(torch.tensor(0.0)).item() == pytest.approx(0.001)
    assert flow_time(torch.tensor(1.0 - 2**-24)).item() <= 1.0
    # P(t < x) = x^1.5 before the affine map
    assert (beta < 0.25).double().mean().item() == pytest.approx(0.125, abs=1e-4)


def test_noisy_action_runs_from_the_action_to_the_noise():
    actions, noise = torch.randn(2, 1, 4, 3), torch.randn(2, 5, 4, 3)
    assert torch.equal(noisy_action(actions, noise, torch.ones(2, 5)), noise)
    assert torch.equal(noisy_action(actions, noise, torch.zeros(2, 5)), actions.expand_as(noise))
    quarter = noisy_action(actions, noise, torch.full((2, 5), 0.25))
    torch.testing.assert_close(quarter, 0.25 * noise + 0.75 * actions)


def test_target_velocity_is_the_time_derivative_of_the_path():
    actions, noise = torch.randn(2, 1, 4, 3).double(), torch.randn(2, 5, 4, 3).double()
    time = torch.rand(2, 5).double()
    difference = noisy_action(actions, noise, time + 1e-6) - noisy_action(actions, noise, time - 1e-6)
    torch.testing.assert_close(target_velocity(actions, noise), difference / 2e-6, rtol=1e-7, atol=1e-7)


def test_euler_on_the_exact_field_arrives_at_the_action():
    times = []

    def field(x, time):
        times.append(time)
        return (x - 0.3) / time[..., None, None]

    action = euler(field, torch.ones(2, 5, 4, 3), 10)
    torch.testing.assert_close(action, torch.full((2, 5, 4, 3), 0.3), rtol=0, atol=1e-7)
    assert [time[0, 0].item() for time in times] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert times[0].shape == (2, 5)


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 0.34867844), (5, 0.32768), (4, 0.31640625)])
def test_euler_on_a_linear_field_takes_every_step(num_steps, expected):
    action = euler(lambda x, time: x, torch.ones(1, 1, 1, dtype=torch.float64), num_steps)
    assert action.item() == pytest.approx(expected, abs=1e-8)


def test_guidance_is_exact_at_both_ends_and_linear_between_and_beyond():
    generator = torch.Generator().manual_seed(0)
    unconditional, conditional = torch.randn(2, 1000, generator=generator)
    # The formula itself rounds, so bit equality has to be arranged.
    assert not torch.equal(unconditional + 1.0 * (conditional - unconditional), conditional)
    guidance_beta = torch.tensor([1.0, 0.0, 0.5, 1.5, 2.5])[:, None]  # each row its own
    guided = guided_velocity(unconditional, conditional, guidance_beta)
    assert torch.equal(guided[0], conditional)
    assert torch.equal(guided[1], unconditional)
    torch.testing.assert_close(guided, (1 - guidance_beta) * unconditional + guidance_beta * conditional)
