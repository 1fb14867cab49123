"""IQL's losses against closed forms, tabular fixed points and three steps of the paper's update written in numpy."""

import math

import numpy as np
import pytest
import torch

from recap_ds.algo.iql import advantage, expectile_loss, extraction_weight, q_loss, td_target, value_loss


def test_expectile_loss_by_hand():
    loss = expectile_loss(torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0]), 0.7)
    torch.testing.assert_close(loss, torch.tensor([1.2, 0.3, 0.0, 0.175, 0.7]))
    assert loss.mean().item() == pytest.approx(0.475)


@pytest.mark.parametrize(("expectile", "minimiser"), [(0.5, 1.5), (0.7, 1.9), (0.9, 2.5)])
def test_expectile_of_four_numbers_is_where_the_gradient_vanishes(expectile, minimiser):
    numbers = torch.arange(4, dtype=torch.float64)
    value = torch.tensor(minimiser, dtype=torch.float64, requires_grad=True)
    expectile_loss(numbers - value, expectile).sum().backward()
    assert value.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_td_target_stops_at_an_end_clips_and_carries_no_gradient():
    next_value = torch.tensor([-0.5, -0.5, -0.9, 0.5], requires_grad=True)
    parts = torch.tensor([-0.1, -0.1, -0.3, -0.1]), torch.full((4,), 0.9), torch.tensor([1.0, 0.0, 1.0, 1.0])
    clipped, free = td_target(*parts, next_value, clip=True), td_target(*parts, next_value, clip=False)
    torch.testing.assert_close(clipped, torch.tensor([-0.55, -0.1, -1.0, 0.0]))
    torch.testing.assert_close(free, torch.tensor([-0.55, -0.1, -1.11, 0.35]))
    assert not clipped.requires_grad
    assert not free.requires_grad


def test_q_loss_is_the_sum_over_heads():
    q = torch.tensor([[1.0, 0.0], [3.0, -1.0]])
    assert q_loss(q, torch.tensor([0.0, 2.0])).tolist() == [1.0 + 9.0, 4.0 + 9.0]


def test_value_and_advantage_use_the_smallest_head_and_leave_the_targets_alone():
    target_q = torch.tensor([[-0.2, -0.6], [-0.4, -0.5]], requires_grad=True)
    v = torch.tensor([-0.5, -0.5], requires_grad=True)
    torch.testing.assert_close(advantage(target_q, v), torch.tensor([0.1, -0.1]))
    assert not advantage(target_q, v).requires_grad
    loss = value_loss(target_q, v, 0.7)
    torch.testing.assert_close(loss, torch.tensor([0.007, 0.003]))
    loss.sum().backward()
    assert target_q.grad is None
    torch.testing.assert_close(v.grad, torch.tensor([-2 * 0.7 * 0.1, 2 * 0.3 * 0.1]))


def test_extraction_weight_of_the_reference_temperature():
    # The reference multiplies by 3; here that is a temperature of 1/3.
    weight = extraction_weight(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 1 / 3, torch.ones(4))
    torch.testing.assert_close(weight, torch.tensor([0.0498, 1.0, 20.086, 100.0]), rtol=1e-3, atol=1e-4)


def test_extraction_weight_scales_with_the_task_and_never_overflows():
    weight = extraction_weight(torch.tensor([0.2, 0.02, 1e30, -1e30]), 0.5, torch.tensor([0.4, 0.04, 1e-6, 1e-6]))
    torch.testing.assert_close(weight[:2], torch.full((2,), math.e))
    assert weight[2].item() == 100.0  # not 100.00001, which exp(log(100)) is in float32
    assert weight[3].item() == 0.0
    assert extraction_weight(torch.tensor([0.3]), 0.5, torch.tensor([math.inf])).item() == 1.0


# A corridor of five cells. Each step costs 1; moving right from the last cell ends the task. Behaviour: a fair coin.
NUM_CELLS, DISCOUNT = 5, 0.9
CELL = torch.arange(NUM_CELLS).repeat_interleave(2)
ACTION = torch.tensor([0, 1]).repeat(NUM_CELLS)
NEXT_CELL = (CELL + 2 * ACTION - 1).clamp(0, NUM_CELLS - 1)
CONTINUES = 1.0 - ((CELL == NUM_CELLS - 1) & (ACTION == 1)).double()


def corridor_values(expectile, num_sweeps=1500):
    """V of every cell by gradient descent on tables, with our losses and nothing else."""
    v = torch.full((NUM_CELLS,), -10.0, dtype=torch.float64, requires_grad=True)
    q = torch.full((2, len(CELL)), -10.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([v, q], lr=0.25)
    cost = torch.full((len(CELL),), -1.0, dtype=torch.float64)
    for _ in range(num_sweeps):
        target = td_target(cost, torch.full_like(cost, DISCOUNT), CONTINUES, v[NEXT_CELL], clip=False)
        loss = value_loss(q, v[CELL], expectile).sum() + q_loss(q, target).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return v.detach()


def test_expectile_one_half_learns_the_value_of_the_behaviour():
    transition, cost = np.zeros((NUM_CELLS, NUM_CELLS)), -np.ones(NUM_CELLS)
    for cell, following, continues in zip(CELL, NEXT_CELL, CONTINUES, strict=True):
        transition[cell, following] += 0.5 * continues
    expected = np.linalg.solve(np.eye(NUM_CELLS) - DISCOUNT * transition, cost)
    np.testing.assert_allclose(corridor_values(0.5).numpy(), expected, atol=1e-6)


def test_expectile_near_one_learns_the_optimal_value():
    steps = np.arange(NUM_CELLS, 0, -1)
    optimal = -(1 - DISCOUNT**steps) / (1 - DISCOUNT)  # walk right
    moderate, near_one = corridor_values(0.9).numpy(), corridor_values(0.999).numpy()
    np.testing.assert_allclose(near_one, optimal, atol=0.02)
    assert np.all(near_one <= optimal + 1e-9)
    assert np.all(moderate < near_one)


def test_bootstrapping_from_the_same_state_gives_another_answer():
    # Two states, 0 -> 1 -> success. With o_{t+k} mistaken for o_t the value of state 0 is a geometric series instead.
    reward, continues = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])
    discount = torch.full((2,), 0.5)
    right, wrong = torch.zeros(2), torch.zeros(2)
    for _ in range(60):
        right = td_target(reward, discount, continues, right[[1, 1]], clip=False)
        wrong = td_target(reward, discount, continues, wrong[[0, 1]], clip=False)
    assert right.tolist() == [-1.0, 0.0]
    assert wrong.tolist() == [-2.0, 0.0]


def test_three_steps_equal_the_paper_written_in_numpy():
    rng = np.random.default_rng(0)
    num_samples, width, rate, learning_rate, expectile = 32, 5, 0.005, 0.1, 0.8
    state, next_state = rng.normal(size=(2, num_samples, width))
    pair = np.concatenate([state, rng.normal(size=(num_samples, 2))], axis=1)
    reward, discount = rng.normal(size=num_samples), rng.uniform(0.8, 1.0, size=num_samples)
    continues = (rng.uniform(size=num_samples) > 0.2).astype(float)
    v0, q0 = rng.normal(size=width), rng.normal(size=(2, width + 2))

    # Kostrikov et al., Eq. 5 and 6 on linear functions, both gradients at the same parameters, by hand.
    v, q, target = v0.copy(), q0.copy(), 0.5 * q0
    for _ in range(3):
        error = (pair @ target.T).min(axis=1) - state @ v
        v_gradient = -2 * np.mean(
            np.where(error > 0, expectile, 1 - expectile)[:, None] * error[:, None] * state, axis=0
        )
        y = reward + discount * continues * (next_state @ v)
        q_gradient = np.stack([2 * np.mean((pair @ head - y)[:, None] * pair, axis=0) for head in q])
        v, q = v - learning_rate * v_gradient, q - learning_rate * q_gradient
        target = rate * q + (1 - rate) * target

    torch_v, torch_q = (torch.tensor(array, requires_grad=True) for array in (v0, q0))
    torch_target = torch.tensor(0.5 * q0)
    optimizer = torch.optim.SGD([torch_v, torch_q], lr=learning_rate)
    o, o_next, oa = map(torch.tensor, (state, next_state, pair))
    r, g, c = map(torch.tensor, (reward, discount, continues))
    for _ in range(3):
        optimizer.zero_grad()
        v_loss = value_loss(torch_target @ oa.T, o @ torch_v, expectile).mean()
        bellman = q_loss(torch_q @ oa.T, td_target(r, g, c, o_next @ torch_v, clip=False)).mean()
        (v_loss + bellman).backward()
        optimizer.step()
        torch_target.lerp_(torch_q.detach(), rate)
    np.testing.assert_allclose(torch_v.detach().numpy(), v, rtol=1e-12)
    np.testing.assert_allclose(torch_q.detach().numpy(), q, rtol=1e-12)
    np.testing.assert_allclose(torch_target.numpy(), target, rtol=1e-12)
