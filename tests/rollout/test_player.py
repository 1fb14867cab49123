"""Episodes as one process plays them: time, records, rendering, takeovers."""

import numpy as np
import pytest

from recap_ds.config import CollectConfig
from recap_ds.rollout.corrector import ScriptedCorrector
from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode, PlayRules
from recap_ds.rollout.player import Player
from tests.rollout.line_world import LineWorld


def player(max_steps=12, **collect):
    world, rules = LineWorld(max_steps), PlayRules(CollectConfig(**collect), seed=3)
    return Player(world, rules, ScriptedCorrector(world, rules.collect))


def plan(task="go", seed=0, number=0, **fields):
    return EpisodePlan(number, seed, task, prompt=f"told to {task}", **fields)


def chunk(*values):
    return np.array(values)[:, None]


def play_out(player, plan, actions, value=None):
    """The episode, and the frames at which the policy looked."""
    answer, looks = player.begin(plan), []
    while isinstance(answer, Look):
        looks.append(answer.frame)
        answer = player.play(actions, value)
    return answer, looks


def test_success_ends_an_episode_in_the_middle_of_a_chunk():
    played, looks = play_out(player(), plan(), chunk(1.0, 1.0, 1.0))
    assert played.outcome == "success" and played.num_frames == 5 and looks == [0, 3]
    np.testing.assert_allclose(played.states[:, 0], [0, 0.2, 0.4, 0.6, 0.8], atol=1e-6)
    np.testing.assert_allclose(played.rewards, [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-6)
    assert not played.expert.any() and played.pictures is None


def test_the_world_or_the_clock_ends_a_failure():
    fallen, _ = play_out(player(), plan("fall"), chunk(-1.0))
    assert fallen.outcome == "failure" and fallen.num_frames == 3
    late, looks = play_out(player(max_steps=7), plan(), chunk(0.1, 0.1, 0.1))
    assert late.outcome == "truncated" and late.num_frames == 7 and looks == [0, 3, 6]
    # Both at once: the task has ended.
    assert play_out(player(max_steps=3), plan("fall"), chunk(-1.0))[0].outcome == "failure"
    # A world with a limit of its own.
    closed, _ = play_out(player(), plan("wall"), chunk(0.5))
    assert closed.outcome == "truncated" and closed.num_frames == 4


def test_recorded_actions_are_those_the_world_was_given():
    played, _ = play_out(player(max_steps=2), plan(), chunk(5.0, -5.0))
    assert played.actions.dtype == np.float32 and played.actions[:, 0].tolist() == [1.0, -1.0]


def test_only_what_the_policy_reads_is_rendered():
    one = player()
    played, looks = play_out(one, plan(), chunk(1.0, 1.0, 1.0))
    assert played.num_rendered == one._env.num_renders == len(looks) == 2


def test_a_filmed_episode_has_every_frame_once():
    one = player()
    played, looks = play_out(one, plan(keeps_pictures=True), chunk(0.4, 0.4))
    assert looks == [0, 2, 4, 6, 8, 10]
    assert played.num_rendered == one._env.num_renders == played.num_frames == 12
    assert played.pictures["eye"][:, 0, 0, 0].tolist() == list(range(12))


def test_filming_changes_nothing_else():
    for mode in ("policy", "corrected"):
        plain, _ = play_out(player(), plan("stuck", mode=mode), chunk(0.4, 0.6))
        filmed, _ = play_out(player(), plan("stuck", mode=mode, keeps_pictures=True), chunk(0.4, 0.6))
        for name in ("states", "actions", "rewards", "expert"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(filmed, name))


def test_the_policy_is_told_the_plan_s_words():
    look = player().begin(plan("stuck"))
    assert look.observation["prompt"] == "told to stuck"
    assert sorted(look.observation) == ["observation/eye", "observation/state", "prompt"]


def test_the_expert_takes_over_where_the_policy_is_stuck_and_hands_back():
    one = player(max_steps=30, stall_frames=4, correction_frames=2)
    played, looks = play_out(one, plan("stuck", mode="corrected"), chunk(0.3, 0.3, 0.3))
    # Progress is first measured after frame 0; four frames without any follow, then two of the expert, and again.
    takes = [False] * 5 + [True] * 2
    assert played.expert.tolist() == (takes * 5)[: played.num_frames]
    # The chunk in which the takeover fell is dropped; the policy looks again when it is given control.
    assert looks[:5] == [0, 3, 7, 10, 14]
    assert played.success and played.num_frames == 27


def test_a_policy_that_gets_on_is_left_alone():
    played, _ = play_out(player(stall_frames=2), plan(mode="corrected"), chunk(1.0, 0.1, 1.0))
    assert played.success and not played.expert.any()
    # A margin asks for more than any progress.
    slow, _ = play_out(player(stall_frames=2, stall_margin=0.3), plan(mode="corrected"), chunk(0.5, 0.5, 0.5))
    assert slow.expert.any()


def test_a_takeover_may_go_by_a_critic_s_value():
    one = player(max_steps=20, stall_frames=6, correction_frames=3)
    one.begin(plan(mode="corrected"))
    # Looks at frames 0, 3, 6: the value has stood still for six frames at the third one.
    assert [one.play(chunk(0.1, 0.1, 0.1), -0.5).frame for _ in range(2)] == [3, 6]
    assert one.play(chunk(0.1, 0.1, 0.1), -0.5).frame == 9
    assert np.array([frame[3] for frame in one._frames]).tolist() == [False] * 6 + [True] * 3


def test_the_expert_s_own_episodes_need_no_policy():
    played = player().begin(plan(mode="expert", keeps_pictures=True))
    assert isinstance(played, PlayedEpisode) and played.success and played.expert.all()
    np.testing.assert_allclose(played.actions, 0.8, atol=1e-7)
    assert len(played.pictures["eye"]) == played.num_frames == 7
    wobbly = player(demo_noise=0.1).begin(plan(mode="expert")).actions
    assert 0.02 < wobbly.std() < 0.25


def test_a_mediocre_expert_is_corrected_like_a_policy():
    settings = {"expert_speed": 0.3, "expert_bias": 0.0, "expert_noise": 0.0, "stall_frames": 4, "correction_frames": 2}
    played = player(max_steps=30, **settings).begin(plan("stuck", mode="corrected", stands_in=True))
    assert played.expert.tolist() == ([False] * 5 + [True] * 2) * 3 + [False] * 5 + [True] and played.success


def test_a_mediocre_expert_is_slow_biased_and_noisy_by_its_number_alone():
    exact = {"expert_speed": 1.0, "expert_bias": 0.0, "expert_noise": 0.0}
    slow = player(max_steps=50, **{**exact, "expert_speed": 0.5}).begin(plan(stands_in=True))
    np.testing.assert_allclose(slow.actions, 0.4, atol=1e-7)
    assert slow.success and not slow.expert.any()  # it acts as a policy would
    one = {**exact, "expert_bias": 0.3}
    biased = [player(**one).begin(plan(stands_in=True, number=n)).actions for n in (0, 0, 1)]
    assert np.ptp(biased[0]) == 0 and np.array_equal(biased[0], biased[1]) and biased[0][0] != biased[2][0]
    shaky = {**exact, "expert_noise": 0.1, "expert_speed": 0.01}
    noisy = player(max_steps=400, **shaky).begin(plan(seed=90, stands_in=True))
    assert noisy.actions.std() == pytest.approx(0.1, rel=0.15) and noisy.actions.mean() == pytest.approx(0.0, abs=0.03)


def test_a_recorded_episode_can_be_replayed():
    played = player(max_steps=40).begin(plan(seed=7, stands_in=True))
    assert played.num_frames > 10
    world = LineWorld()
    world.reset(played.plan.seed, played.plan.task)
    for state, action in zip(played.states, played.actions, strict=True):
        np.testing.assert_array_equal(world.state(), state)
        world.step(action)
