"""Returns and TD windows against closed forms, hand-written sums and a backwards recursion in plain Python."""

import math

import pytest
import torch

from recap_ds.algo.iql import td_target
from recap_ds.algo.returns import ReturnRule, monte_carlo_return, td_window, value_scale
from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS
from recap_ds.config import ValueConfig
from recap_ds.errors import UsageError


def whole_episode(num_frames, outcome, *, td_horizon, rule, failure_cost=300.0, normaliser=1.0, rewards=None):
    """The window of every frame of one episode in which control never changes."""
    steps_to_end = torch.arange(num_frames - 1, -1, -1)
    return td_window(
        steps_to_end,
        steps_to_end + 1,
        torch.full((num_frames,), OUTCOME_IDS[outcome]),
        td_horizon=td_horizon,
        rule=rule,
        failure_cost=torch.full((num_frames,), failure_cost, dtype=torch.float64),
        normaliser=torch.full((num_frames,), normaliser, dtype=torch.float64),
        rewards=rewards,
    )


def returns_of(num_frames, outcome, *, failure_cost=300.0, normaliser=1000.0, discount=1.0, timeout_is="failure"):
    steps_to_end = torch.arange(num_frames - 1, -1, -1)
    return monte_carlo_return(
        steps_to_end,
        torch.full((num_frames,), OUTCOME_IDS[outcome]),
        timeout_is=timeout_is,
        failure_cost=torch.full((num_frames,), failure_cost, dtype=torch.float64),
        normaliser=torch.full((num_frames,), normaliser, dtype=torch.float64),
        discount=discount,
    )


def recursion(num_frames, end_reward, discount):
    """R_t = r_t + g R_{t+1}, backwards from the last frame."""
    returns, following = [], 0.0
    for frame in reversed(range(num_frames)):
        following = (end_reward if frame == num_frames - 1 else -1.0) + discount * following
        returns.insert(0, following)
    return returns


@pytest.mark.parametrize(
    ("outcome", "discount", "expected"),
    [
        ("success", 1.0, [-4, -3, -2, -1, 0]),
        ("failure", 1.0, [-304, -303, -302, -301, -300]),
        ("truncated", 1.0, [-304, -303, -302, -301, -300]),  # a time-out is a failure by default
        ("success", 0.9, [-3.439, -2.71, -1.9, -1, 0]),
    ],
)
def test_monte_carlo_return_of_five_frames(outcome, discount, expected):
    value, valid = returns_of(5, outcome, discount=discount)
    torch.testing.assert_close(value * 1000, torch.tensor(expected, dtype=torch.float32))
    assert valid.all()
    assert value.dtype == torch.float32


def test_monte_carlo_return_is_divided_and_clipped():
    value, _ = returns_of(5, "success", normaliser=8.0)
    assert value.tolist() == [-0.5, -0.375, -0.25, -0.125, 0.0]
    value, _ = returns_of(5, "failure", failure_cost=8.0, normaliser=8.0)
    assert value.tolist() == [-1.0] * 5
    # An episode longer than its task's L is clipped, not refused.
    assert returns_of(12, "success", normaliser=8.0)[0].tolist()[:4] == [-1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("discount", [0.9, 0.999, 1.0 - 1e-9, 1.0])
@pytest.mark.parametrize(("outcome", "end_reward"), [("success", 0.0), ("failure", -20.0)])
def test_monte_carlo_return_equals_the_recursion(discount, outcome, end_reward):
    value, _ = returns_of(60, outcome, failure_cost=20.0, discount=discount)
    expected = torch.tensor(recursion(60, end_reward, discount)) / 1000
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("outcome", "timeout_is", "known"),
    [
        ("truncated", "truncated", False),
        ("unknown", "truncated", False),
        ("unknown", "failure", False),
        ("success", "truncated", True),
        ("failure", "truncated", True),
    ],
)
def test_monte_carlo_return_is_known_only_where_the_task_ended(outcome, timeout_is, known):
    _, valid = returns_of(3, outcome, timeout_is=timeout_is)
    assert valid.tolist() == [known] * 3


def test_chunk_reward_and_discount_of_a_full_window():
    window = whole_episode(100, "success", td_horizon=10, rule=ReturnRule("sparse_time", 0.99, "failure"))
    assert window.chunk_reward[0].item() == pytest.approx(-9.561792, abs=1e-6)
    assert window.chunk_discount[0].item() == pytest.approx(0.904382, abs=1e-6)
    window = whole_episode(100, "success", td_horizon=50, rule=ReturnRule("sparse_time", 0.99, "failure"))
    assert window.chunk_discount[0].item() == pytest.approx(0.605006, abs=1e-6)


@pytest.mark.parametrize(
    ("td_horizon", "expected"), [(2, [0, 0.1, 0.05, 0.05, 0.05]), (50, [0.1, 0.15, 0.1, 0.05, 0.05])]
)
def test_windows_give_the_n_step_advantages_of_the_reference_episode(td_horizon, expected):
    value = torch.tensor([-0.5, -0.45, -0.3, -0.15, -0.05])
    window = whole_episode(
        5, "success", td_horizon=td_horizon, rule=ReturnRule("sparse_time", 1.0, "failure"), normaliser=10.0
    )
    next_value = value[(torch.arange(5) + window.steps).clamp(max=4)]
    target = window.chunk_reward + window.chunk_discount * window.continues * next_value
    torch.testing.assert_close(target - value, torch.tensor(expected), rtol=0, atol=1e-7)


def test_a_failed_end_pays_once_and_stops():
    window = whole_episode(4, "failure", td_horizon=3, rule=ReturnRule("sparse_time", 0.5, "failure"), failure_cost=8.0)
    assert window.steps.tolist() == [3, 3, 2, 1]
    assert window.continues.tolist() == [1, 0, 0, 0]
    # -(1 + .5 + .25); -(1 + .5) - 8/4; -1 - 8/2; -8
    assert window.chunk_reward.tolist() == [-1.75, -3.5, -5.0, -8.0]
    assert window.chunk_discount.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert window.valid.all()


@pytest.mark.parametrize(("outcome", "timeout_is"), [("truncated", "truncated"), ("unknown", "failure")])
def test_a_task_that_went_on_bootstraps_from_the_last_observation(outcome, timeout_is):
    window = whole_episode(4, outcome, td_horizon=3, rule=ReturnRule("sparse_time", 0.5, timeout_is), failure_cost=8.0)
    # Next observations: o_3 from frames 0, 1 and 2, none from o_3 itself.
    assert window.steps.tolist() == [3, 2, 1, 0]
    assert window.valid.tolist() == [True, True, True, False]
    assert window.continues.tolist() == [1, 1, 1, 1]
    assert window.chunk_reward.tolist() == [-1.75, -1.5, -1.0, 0.0]  # the failure cost is nobody's


def test_a_timeout_read_as_failure_equals_a_failure():
    rule = ReturnRule("sparse_time", 0.9, "failure")
    timeout = whole_episode(7, "truncated", td_horizon=3, rule=rule)
    failure = whole_episode(7, "failure", td_horizon=3, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(timeout, failure, strict=True))


def test_a_chunk_cut_by_a_takeover_bootstraps_at_the_takeover():
    # Ten frames, a human takes over at frame 4: from frame 2 the window holds frames 2 and 3 and looks at o_4.
    # The human's chunk from frame 8 reaches the end.
    window = td_window(
        steps_to_end=torch.tensor([7, 1]),
        num_valid=torch.tensor([2, 2]),
        outcome=torch.tensor([OUTCOME_IDS["success"]] * 2),
        td_horizon=5,
        rule=ReturnRule("sparse_time", 0.5, "failure"),
        failure_cost=torch.tensor([8.0, 8.0]),
        normaliser=torch.tensor([10.0, 10.0]),
    )
    assert window.steps.tolist() == [2, 2]
    assert window.continues.tolist() == [1.0, 0.0]
    assert window.chunk_discount.tolist() == [0.25, 0.25]
    torch.testing.assert_close(window.chunk_reward, torch.tensor([-0.15, -0.1]))
    next_value = torch.tensor([-0.4, -123.0])  # past the end nothing is looked at
    target = td_target(window.chunk_reward, window.chunk_discount, window.continues, next_value, clip=False)
    torch.testing.assert_close(target, torch.tensor([-0.15 - 0.25 * 0.4, -0.1]))


@pytest.mark.parametrize(("control", "charged"), [("policy", [0.0, 0.0, 6.0 / 4, 6.0 / 2, 6.0]), ("human", [0.0] * 5)])
def test_only_a_window_of_the_policy_that_ends_in_a_takeover_is_charged_for_it(control, charged):
    # Frames 0..4 of eight; control changes hands at frame 5. The charge is discounted to the window's first frame.
    frames = torch.arange(5)
    marks = {
        "steps_to_end": 7 - frames,
        "num_valid": 5 - frames,
        "outcome": torch.full((5,), OUTCOME_IDS["success"]),
        "td_horizon": 3,
        "rule": ReturnRule("sparse_time", 0.5, "failure"),
        "failure_cost": torch.full((5,), 8.0),
        "normaliser": torch.full((5,), 2.0),
    }
    free = td_window(**marks)
    paying = td_window(**marks, control=torch.full((5,), CONTROL_IDS[control]), takeover_cost=torch.full((5,), 12.0))
    torch.testing.assert_close(free.chunk_reward - paying.chunk_reward, torch.tensor(charged))
    for name in ("steps", "continues", "valid", "chunk_discount"):
        assert torch.equal(getattr(free, name), getattr(paying, name))


def test_a_policy_that_reaches_the_end_pays_for_no_takeover():
    one = torch.ones(2)
    paying = td_window(
        torch.tensor([1, 1]),
        torch.tensor([2, 2]),
        td_horizon=5,
        rule=ReturnRule("sparse_time", 1.0, "failure"),
        failure_cost=one,
        normaliser=one,
        control=torch.full((2,), CONTROL_IDS["policy"]),
        takeover_cost=100 * one,
        outcome=torch.tensor([OUTCOME_IDS["success"], OUTCOME_IDS["unknown"]]),
    )
    assert paying.chunk_reward.tolist() == [-1.0, -1.0]


def test_environment_rewards_are_summed_within_the_window_only():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0]] * 3)
    rewards[2, 1:] = math.nan  # padding past the end
    window = whole_episode(
        3, "success", td_horizon=3, rule=ReturnRule("environment", 0.5, "failure"), normaliser=2.0, rewards=rewards
    )
    assert window.chunk_reward.tolist() == [1.5, 1.0, 0.5]
    assert window.continues.tolist() == [0, 0, 0]


def test_a_chunk_of_one_frame_is_the_one_step_target():
    window = whole_episode(4, "failure", td_horizon=1, rule=ReturnRule("sparse_time", 0.9, "failure"), failure_cost=8.0)
    next_value = torch.tensor([-3.0, -5.0, -7.0, math.inf])
    target = td_target(
        window.chunk_reward, window.chunk_discount, window.continues, next_value.clamp(max=0), clip=False
    )
    torch.testing.assert_close(target, torch.tensor([-1 - 0.9 * 3, -1 - 0.9 * 5, -1 - 0.9 * 7, -8.0]))


@pytest.mark.parametrize("td_horizon", [1, 3, 50])
@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_bootstrapping_to_the_fixed_point_gives_the_monte_carlo_return(td_horizon, outcome):
    num_frames, discount = 9, 0.97
    window = whole_episode(
        num_frames,
        outcome,
        td_horizon=td_horizon,
        rule=ReturnRule("sparse_time", discount, "failure"),
        failure_cost=5.0,
        normaliser=30.0,
    )
    following = (torch.arange(num_frames) + window.steps).clamp(max=num_frames - 1)
    value = torch.zeros(num_frames)
    for _ in range(num_frames):
        value = td_target(window.chunk_reward, window.chunk_discount, window.continues, value[following], clip=True)
    expected, _ = returns_of(num_frames, outcome, failure_cost=5.0, normaliser=30.0, discount=discount)
    torch.testing.assert_close(value, expected)


def test_value_scale_takes_the_longest_episode_and_its_overrides():
    longest = {"fold": 300, "pour": 80}
    scale = value_scale(ValueConfig(), longest, ["pour", "fold"])
    assert scale.max_length.tolist() == scale.failure_cost.tolist() == scale.normaliser.tolist() == [80, 300]
    assert scale.normaliser.dtype == torch.float64
    config = ValueConfig(c_fail=40, normaliser="max_length_plus_c_fail", max_length={"fold": 500})
    scale = value_scale(config, longest, ["pour", "fold"])
    assert scale.max_length.tolist() == [80, 500]
    assert scale.failure_cost.tolist() == [40, 40]
    assert scale.normaliser.tolist() == [120, 540]
    assert scale.takeover_cost.tolist() == [0, 0]
    assert value_scale(ValueConfig(takeover_penalty=0.25), longest, ["fold"]).takeover_cost.tolist() == [75]


def test_value_scale_refuses_a_task_it_does_not_know():
    with pytest.raises(UsageError, match=r"value\.max_length: unknown task 'flod'; the shards hold 'fold'"):
        value_scale(ValueConfig(max_length={"flod": 5}), {"fold": 300}, ["fold"])
    with pytest.raises(UsageError, match=r"value\.max_length\.fold: 0 is no length"):
        value_scale(ValueConfig(max_length={"fold": 0}), {"fold": 300}, ["fold"])
