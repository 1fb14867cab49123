"""Advantages of whole data sets against the reference episode, sums by hand and the windows of temporal differences."""

import math

import pytest
import torch

from recap_ds.algo.labels import (
    advantage_spread,
    lookahead_window,
    n_step_advantage,
    num_positive,
    sparse_time_reward,
    top_fraction,
)
from recap_ds.algo.returns import ReturnRule, monte_carlo_return, takeovers_ahead, td_window
from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS

POLICY, HUMAN = CONTROL_IDS["policy"], CONTROL_IDS["human"]


class Episode:
    """One whole episode; ``control`` is a string of p (policy) and h (human), a frame each."""

    def __init__(self, control, outcome="success", *, normaliser=10.0, failure_cost=300.0, takeover_cost=0.0):
        self.num_frames = len(control)
        self.steps_to_end = torch.arange(self.num_frames - 1, -1, -1)
        self.control = torch.tensor([POLICY if letter == "p" else HUMAN for letter in control])
        # Run lengths from each frame on, counted the slow way.
        self.num_valid = torch.tensor([len(control[t:]) - len(control[t:].lstrip(control[t])) for t in self.frames])
        self.outcome = torch.full((self.num_frames,), OUTCOME_IDS[outcome])
        self.costs = {
            name: torch.full((self.num_frames,), cost, dtype=torch.float64)
            for name, cost in (
                ("failure_cost", failure_cost),
                ("takeover_cost", takeover_cost),
                ("normaliser", normaliser),
            )
        }

    @property
    def frames(self):
        return range(self.num_frames)

    def window(self, lookahead, timeout_is="failure", **more):
        marks = (self.steps_to_end, self.num_valid, self.outcome, self.control)
        return lookahead_window(*marks, lookahead=lookahead, timeout_is=timeout_is, **more)

    def reward(self, window):
        return sparse_time_reward(window, self.outcome, **self.costs)

    def advantage(self, values, lookahead, timeout_is="failure"):
        window = self.window(lookahead, timeout_is)
        values = torch.tensor(values)
        following = values[(torch.arange(self.num_frames) + window.steps).clamp(max=self.num_frames - 1)]
        return n_step_advantage(self.reward(window), window.continues, following, values)


# RECAP's arithmetic on one successful episode of five frames in a task of at most ten.
REFERENCE_VALUES = [-0.5, -0.45, -0.3, -0.15, -0.05]


@pytest.mark.parametrize(
    ("lookahead", "expected"),
    [
        (2, [0, 0.1, 0.05, 0.05, 0.05]),
        (50, [0.1, 0.15, 0.1, 0.05, 0.05]),
        (None, [0.1, 0.15, 0.1, 0.05, 0.05]),
        (1, [-0.05, 0.05, 0.05, 0.0, 0.05]),
    ],
)
def test_n_step_advantages_of_the_reference_episode(lookahead, expected):
    advantage = Episode("ppppp").advantage(REFERENCE_VALUES, lookahead)
    torch.testing.assert_close(advantage, torch.tensor(expected), rtol=0, atol=1e-7)
    assert advantage.dtype == torch.float32


def test_two_of_the_five_reference_samples_are_positive_whatever_the_noise():
    # Three advantages are .05 up to rounding: a quantile as threshold marked frames 1, 4 and missed 2, 3 by noise.
    advantage = torch.tensor([0.0, 0.1, 0.05, 0.05, 0.05])
    task, eligible = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool)
    positive = top_fraction(advantage, torch.arange(5), task, eligible, 0.4)
    assert positive.tolist() == [False, True, True, False, False]
    positive = top_fraction(advantage, torch.tensor([0, 1, 4, 3, 2]), task, eligible, 0.4)
    assert positive.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("outcome", ["success", "failure", "truncated"])
def test_looking_to_the_end_is_the_monte_carlo_advantage(outcome):
    episode = Episode("p" * 40, outcome, normaliser=50.0, failure_cost=30.0)
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) - 1.0
    returns, valid = monte_carlo_return(
        episode.steps_to_end,
        episode.outcome,
        timeout_is="failure",
        failure_cost=episode.costs["failure_cost"],
        normaliser=episode.costs["normaliser"],
    )
    assert valid.all()
    torch.testing.assert_close(episode.advantage(values.tolist(), None), returns - values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("control", ["pppppppp", "ppphhhpp", "hhpphphh"])
@pytest.mark.parametrize(("outcome", "timeout_is"), [("success", "failure"), ("failure", "failure")])
@pytest.mark.parametrize("takeover_cost", [0.0, 2.5])
def test_a_lookahead_within_the_chunk_is_the_td_window(control, outcome, timeout_is, takeover_cost):
    episode = Episode(control, outcome, failure_cost=4.0, takeover_cost=takeover_cost)
    td = td_window(
        episode.steps_to_end,
        episode.num_valid,
        episode.outcome,
        td_horizon=3,
        rule=ReturnRule("sparse_time", 1.0, timeout_is),
        control=episode.control,
        **episode.costs,
    )
    window = episode.window(3, timeout_is)
    assert torch.equal(window.steps, td.steps)
    assert torch.equal(window.valid, td.valid)
    assert torch.equal(window.continues.float(), td.continues)
    assert torch.equal(episode.reward(window).float(), td.chunk_reward)


def test_the_window_stops_at_a_change_of_control():
    episode = Episode("ppphhhpp")
    window = episode.window(None)
    assert window.steps.tolist() == [3, 2, 1, 3, 2, 1, 2, 1]
    assert window.continues.tolist() == [True] * 6 + [False] * 2
    assert window.takeover.tolist() == [True] * 3 + [False] * 5  # handing back is none
    assert episode.window(2).takeover.tolist() == [False, True, True] + [False] * 5
    # Frame 0 earns V(o_3) and the three frames before it, however well the human did afterwards.
    values = [-0.9, -0.8, -0.7, -0.5, -0.1, -0.1, -0.1, -0.1]
    assert episode.advantage(values, None)[0].item() == pytest.approx(-0.3 - 0.5 + 0.9)


def test_targets_are_clipped_and_values_are_not():
    episode = Episode("ppp", "failure", normaliser=10.0, failure_cost=300.0)
    assert episode.advantage([-0.4, -0.4, -1.0], 50).tolist() == pytest.approx([-0.6, -0.6, 0.0])
    episode = Episode("ppp", normaliser=10.0)
    assert episode.advantage([0.1, -0.95, -0.2], 1).tolist() == pytest.approx([-1.05 + 0.05 - 0.1, 0.65, 0.2])


def test_a_task_that_went_on_bootstraps_from_the_last_frame_that_has_a_value():
    episode = Episode("pppp", "truncated", failure_cost=8.0)
    window = episode.window(None, "truncated")
    assert window.steps.tolist() == [3, 2, 1, 0]
    assert window.valid.tolist() == [True, True, True, False]
    assert window.continues.all()
    values = [-0.9, -0.8, -0.7, -0.5]
    assert episode.advantage(values, None, "truncated").tolist() == pytest.approx([0.1, 0.1, 0.1, 0.0])
    # Every second frame is a sample, so o_2 is the last with a value; frames 1 and 3 are not asked for.
    window = episode.window(None, "truncated", steps_to_last_value=torch.tensor([2, 1, 0, 0]))
    assert window.steps[[0, 2]].tolist() == [2, 0]
    # A task that ended needs no value there.
    ended = Episode("pppp").window(None, steps_to_last_value=torch.tensor([2, 1, 0, 0]))
    assert ended.steps.tolist() == [4, 3, 2, 1]


def test_a_value_past_the_end_is_not_read():
    nothing = torch.tensor([math.nan])
    assert n_step_advantage(torch.tensor([-0.2]), torch.tensor([False]), nothing, torch.tensor([-0.5])).item() == (
        pytest.approx(0.3)
    )


def test_the_penalty_of_a_takeover_is_paid_in_the_last_frame_before_it():
    episode = Episode("ppphhp", takeover_cost=4.0)
    assert episode.reward(episode.window(1)).tolist() == pytest.approx([-0.1, -0.1, -0.5, -0.1, -0.1, 0.0])
    assert episode.reward(episode.window(None)).tolist() == pytest.approx([-0.7, -0.6, -0.5, -0.2, -0.1, 0.0])


@pytest.mark.parametrize("stride", [1, 2])
def test_takeovers_ahead_are_counted_once_over_episodes_in_any_order(stride):
    expected = {
        "ppphhphp": [2, 2, 2, 1, 1, 1, 0, 0],
        "pppp": [0, 0, 0, 0],
        "hhp": [0, 0, 0],
        "phphphh": [3, 2, 2, 1, 1, 0, 0],
        "p": [0],
    }
    rows = []
    for number, (control, counts) in enumerate(expected.items()):
        episode = Episode(control)
        starts = [t for t in episode.frames if t == 0 or control[t] != control[t - 1]]
        # Samples as an importer takes them: every stride-th frame from the start of each stretch.
        for frame in episode.frames:
            if (frame - max(start for start in starts if start <= frame)) % stride == 0:
                marks = (episode.num_valid[frame], episode.steps_to_end[frame], episode.control[frame])
                rows.append([number, frame, *map(int, marks), counts[frame]])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    *columns, counts = torch.tensor(rows)[order].T
    assert torch.equal(takeovers_ahead(*columns), counts)
    assert takeovers_ahead(*(torch.zeros(0, dtype=torch.int64) for _ in range(5))).tolist() == []


def test_monte_carlo_return_with_takeovers_equals_the_recursion():
    episode, cost = Episode("ppphhphp", "failure", normaliser=50.0, failure_cost=6.0), 5.0
    ahead = takeovers_ahead(
        torch.zeros(8, dtype=torch.int64), torch.arange(8), episode.num_valid, episode.steps_to_end, episode.control
    )
    returns, _ = monte_carlo_return(
        episode.steps_to_end,
        episode.outcome,
        timeout_is="failure",
        failure_cost=episode.costs["failure_cost"],
        normaliser=episode.costs["normaliser"],
        takeover_charge=ahead * cost,
    )
    expected, following = [], 0.0
    for frame in reversed(episode.frames):
        following += -6.0 if frame == 7 else -1.0
        if frame in (2, 5):  # a human takes over at frames 3 and 6
            following -= cost
        expected.insert(0, following / 50.0)
    torch.testing.assert_close(returns, torch.tensor(expected))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("num_levels", [3, 1000])  # nearly all tied, hardly any tied
def test_exactly_the_asked_number_per_task_is_positive(fraction, num_levels):
    generator = torch.Generator().manual_seed(num_levels)
    num, num_tasks = 500, 4
    advantage = torch.randint(num_levels, (num,), generator=generator) / num_levels
    task = torch.randint(num_tasks - 1, (num,), generator=generator)  # the last task has no sample
    eligible = torch.rand(num, generator=generator) < 0.8
    key = torch.randperm(num, generator=generator)
    positive = top_fraction(advantage, key, task, eligible, fraction)
    assert not (positive & ~eligible).any()
    for number in range(num_tasks):
        members = [row for row in range(num) if task[row] == number and eligible[row]]
        members.sort(key=lambda row: (-advantage[row].item(), key[row].item()))
        expected = set(members[: round(fraction * len(members))])
        assert {row for row in members if positive[row]} == expected

    shuffled = torch.randperm(num, generator=generator)
    again = top_fraction(advantage[shuffled], key[shuffled], task[shuffled], eligible[shuffled], fraction)
    assert torch.equal(again, positive[shuffled]), "the order of rows says nothing"


def test_halves_round_to_the_even_number_as_the_ring_of_joint_training_does():
    assert [num_positive(num, 0.5) for num in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert num_positive(5, 0.4) == 2
    assert [torch.tensor(0.5 * num, dtype=torch.float64).round().item() for num in (1, 3, 5, 7)] == [0, 2, 2, 4]


def test_an_advantage_that_is_no_number_is_refused_only_where_it_counts():
    advantage, zeros = torch.tensor([math.nan, 0.1, 0.2]), torch.zeros(3, dtype=torch.int64)
    eligible = torch.tensor([False, True, True])
    assert top_fraction(advantage, torch.arange(3), zeros, eligible, 0.5).tolist() == [False, False, True]
    with pytest.raises(AssertionError, match="no rank"):
        top_fraction(advantage, torch.arange(3), zeros, ~eligible, 0.5)


def test_spread_is_each_tasks_own_over_eligible_samples():
    advantage = torch.tensor([0.0, 0.2, 9.0, 0.5, 0.5])
    task = torch.tensor([0, 0, 0, 2, 2])
    eligible = torch.tensor([True, True, False, True, True])
    sigma = advantage_spread(advantage, task, eligible, 3)
    torch.testing.assert_close(sigma, torch.tensor([0.1, math.inf, 1e-6]))
