"""Corrections from the keyboard: which key does what, and what of it is recorded. The window is a made one."""

from dataclasses import replace

import numpy as np
import pytest

from recap_ds.config import CollectConfig
from recap_ds.envs.reach_world import ReachWorld
from recap_ds.errors import UsageError
from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode, PlayRules
from recap_ds.rollout.keyboard import MOVES, KeyboardCorrector, PersonLeft, moves_of
from recap_ds.rollout.player import Player
from tests.rollout.fake_window import NOTHING, FakeWindow, hold, tap
from tests.rollout.line_world import LineWorld

PLAN = EpisodePlan(0, seed=5, task="reach_red", prompt="go there", keeps_pictures=True, mode="corrected")
STILL = np.zeros((3, 2))


def keyboard_player(world, *ticks):
    window = FakeWindow(*ticks)
    return Player(world, PlayRules(CollectConfig(), seed=0), KeyboardCorrector(world, window)), window


def reach(max_steps=8):
    return ReachWorld("reach", "", None, 32, max_steps)


def play_out(player, plan, actions):
    answer, looks = player.begin(plan), []
    while isinstance(answer, Look):
        looks.append(answer.frame)
        answer = player.play(actions)
    return answer, looks


def test_a_key_takes_over_others_move_and_the_same_hands_back():
    ticks = [NOTHING, NOTHING, tap("t")]  # at the start, and after each of two frames of the policy's
    ticks += [NOTHING, hold("right"), hold("left", "up"), tap("8"), tap("down"), hold("space"), tap("t")]
    ticks += [NOTHING] * 2
    player, window = keyboard_player(reach(), *ticks)
    played, looks = play_out(player, PLAN, STILL + 0.25)
    # The chunk is dropped where the person takes over; ticks without a key that acts are no frames.
    assert played.expert.tolist() == [False] * 2 + [True] * 4 + [False] * 2 and looks == [0, 6]
    expected = [[0.25, 0.25]] * 2 + [[0.5, 0], [-0.5, 0.5], [0, -0.8], [0, 0]] + [[0.25, 0.25]] * 2
    np.testing.assert_allclose(played.actions, expected, atol=1e-6)
    assert not played.success and len(played.pictures["top"]) == 8 and played.num_rendered == 8
    # What was on the screen: the frame that the key pressed next acts in.
    np.testing.assert_array_equal(window.shown[4]["top"], played.pictures["top"][2])
    assert "the policy acts; t takes over" in window.lines[0][0] and "[2/8]" in window.lines[3][0]
    assert "YOU act; t hands back" in window.lines[3][0] and window.lines[3][1] == "go there"
    assert "step size (8/10)" in window.lines[7][3]


def test_a_person_may_act_from_the_first_frame_and_end_an_episode():
    world = reach(max_steps=40)
    world.reset(PLAN.seed, PLAN.task)
    toward, is_done = [], False
    while not is_done:
        action = np.where(np.abs(world.expert_action()) > 0.3, np.sign(world.expert_action()), 0.0)
        toward.append([key for key, sign in (("right", 1), ("left", -1)) if action[0] == sign])
        toward[-1] += [key for key, sign in (("up", 1), ("down", -1)) if action[1] == sign]
        is_done = world.step(action).success
    ticks = [tap("t"), tap("0"), *(hold(*keys) for keys in toward)]
    player, _ = keyboard_player(reach(max_steps=40), *ticks)
    played = player.begin(PLAN)
    assert isinstance(played, PlayedEpisode) and played.success and played.expert.all()
    assert played.num_frames == len(toward) < 40 and set(np.unique(played.actions)) <= {-1.0, 0.0, 1.0}


def test_who_never_takes_over_changes_nothing():
    corrected, looks = play_out(keyboard_player(reach(), *[NOTHING] * 9)[0], PLAN, STILL + 0.1)
    alone, alone_looks = play_out(keyboard_player(reach())[0], PLAN._replace(mode="policy"), STILL + 0.1)
    for name in ("states", "actions", "expert", "rewards"):
        np.testing.assert_array_equal(getattr(corrected, name), getattr(alone, name))
    np.testing.assert_array_equal(corrected.pictures["top"], alone.pictures["top"])
    assert looks == alone_looks


def test_a_mediocre_expert_is_taken_over_too():
    ticks = [NOTHING, tap("t"), hold("up"), hold("up"), tap("t"), *[NOTHING] * 5]
    played = keyboard_player(reach(), *ticks)[0].begin(PLAN._replace(stands_in=True))
    assert played.expert.tolist() == [False, True, True, False, False, False, False, False]


@pytest.mark.parametrize("last", [tap("escape"), NOTHING._replace(closed=True)])
def test_escape_or_a_closed_window_ends_it_whoever_acts(last):
    with pytest.raises(PersonLeft):
        keyboard_player(reach(), last)[0].begin(PLAN)
    player, window = keyboard_player(reach(), tap("t"), NOTHING, last)
    with pytest.raises(PersonLeft):
        player.begin(PLAN)
    assert len(window.shown) == 3


class Gripping(LineWorld):
    """A second action dim from -1 to 3 is a gripper, and actions are places: rest is where it is."""

    def __init__(self):
        super().__init__()
        low, high = np.array([-1.0, -1.0]), np.array([1.0, 3.0])
        self.spec = replace(self.spec, action_low=low, action_high=high, gripper_dim=1)

    def rest_action(self):
        return np.array([self.place, 1.0])


def test_the_gripper_keeps_what_it_was_told_and_opens_with_the_episode():
    ticks = [tap("t"), hold("right"), tap("g"), hold("right"), tap("g"), tap("g"), hold("left"), tap("t")]
    player, window = keyboard_player(Gripping(), *ticks, tap("t"), hold("space"))
    player.begin(EpisodePlan(0, seed=0, task="go", prompt="go", mode="corrected"))
    actions = np.array([frame[1] for frame in player._frames])
    assert actions[:, 1].tolist() == [-1, 3, 3, -1, 3, 3]
    # Half a range from where it is each time; each frame moves by a fifth of the action.
    np.testing.assert_allclose(actions[:, 0], [0.5, 0.1, 0.62, 0.244, 0.2928, -0.14864], atol=1e-5)
    assert "gripper (closed)" in window.lines[-1][2] and "0: left/right" in window.lines[0][2]
    with pytest.raises(StopIteration):
        player.begin(EpisodePlan(1, seed=0, task="go", prompt="go", mode="corrected"))
    assert player._frames[0][1].tolist() == [0, -1]


def test_who_takes_over_holds_on_to_what_the_policy_holds():
    for policy, kept in ((2.9, 3.0), (-0.8, -1.0)):
        player, _ = keyboard_player(Gripping(), NOTHING, tap("t"), hold("space"), tap("escape"))
        player.begin(EpisodePlan(0, seed=0, task="go", prompt="go", mode="corrected"))
        with pytest.raises(PersonLeft):
            player.play(np.array([[0.1, policy]]))
        assert player._frames[-1][1][1] == kept and player._frames[-1][3]


def test_every_dim_has_keys_of_its_own_or_it_is_said():
    spec = LineWorld().spec
    keys = [key for pair in MOVES for key in pair]
    assert len(set(keys)) == len(keys) and not {"t", "g", "space", "escape", *"0123456789"} & set(keys)
    wide = replace(spec, action_low=-np.ones(8), action_high=np.ones(8))
    with pytest.raises(UsageError, match="--keyboard: moves up to 7 action dims, --env line has 8"):
        moves_of(wide)
    assert moves_of(replace(wide, gripper_dim=2))[3] == MOVES[2]


def test_up_is_up_on_the_screen():
    spec = reach().spec
    assert moves_of(spec)[1] == ("down", "up")
    assert moves_of(replace(spec, downward_dims=(1,)))[1] == ("up", "down")
