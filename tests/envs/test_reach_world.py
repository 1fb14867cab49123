"""The built-in task through the common interface, and what ``open_environment`` makes of a name and settings."""

import numpy as np
import pytest

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.envs.interface import observe
from recap_ds.envs.reach import MAX_STEPS, PROMPTS, SUCCESS_RADIUS, TASKS
from recap_ds.errors import UsageError


def world(name="reach", **settings):
    return open_environment(name, EnvConfig(**settings))


def test_a_seed_and_a_task_fix_the_episode_whatever_was_played_before():
    first, second = world(), world()
    second.reset(9, "reach_blue")
    second.step(np.ones(2))
    for env in (first, second):
        env.reset(3, "reach_red")
        env.step(np.array([0.3, -1.0]))
    np.testing.assert_array_equal(first.state(), second.state())
    np.testing.assert_array_equal(first.images()["top"], second.images()["top"])
    second.reset(4, "reach_red")
    assert not np.array_equal(first.images()["top"], second.images()["top"])


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds_at_the_named_target(task):
    env = world()
    for seed in range(20):
        env.reset(seed, task)
        result, rewards, before = None, [], env.progress()
        while result is None or not result.terminated:
            result = env.step(env.expert_action())
            rewards.append(result.reward)
            assert env.progress() > before
            before = env.progress()
        assert result.success and rewards == [-1.0] * (len(rewards) - 1) + [0.0]
        assert -env.progress() < SUCCESS_RADIUS and len(rewards) < MAX_STEPS


def test_the_state_holds_position_and_velocity_and_no_target():
    env = world()
    env.reset(0, "reach_red")
    position = env.state()[:2]
    env.step(np.array([0.5, -0.25]))
    assert env.state().dtype == np.float32
    np.testing.assert_allclose(env.state()[:2] - position, [0.04, -0.02], atol=1e-6)
    np.testing.assert_allclose(env.state()[2:], [0.5, -0.25], atol=1e-6)


def test_cameras_have_the_names_the_policy_knows():
    env = world(cameras={"front": "top", "hand": "wrist"}, image_size=32)
    env.reset(0, "reach_blue")
    pictures = env.images()
    assert env.spec.cameras == ("front", "hand") == tuple(pictures)
    assert pictures["front"].shape == (32, 32, 3) and not np.array_equal(pictures["front"], pictures["hand"])
    seen = observe(env, pictures, PROMPTS["reach_blue"])
    assert sorted(seen) == ["observation/front", "observation/hand", "observation/state", "prompt"]


def test_a_policy_names_its_cameras_and_its_size():
    env = open_environment("reach", EnvConfig(), cameras=("wrist",), image_size=48)
    assert env.spec.cameras == ("wrist",)
    env.reset(0, "reach_red")
    assert env.images()["wrist"].shape == (48, 48, 3)
    mapped = open_environment("reach", EnvConfig(cameras={"a": "top", "b": "wrist"}), cameras=("b",))
    assert mapped.spec.cameras == ("b",)


def test_a_name_may_choose_the_task_and_settings_the_time_limit():
    assert tuple(world().spec.tasks) == TASKS and world().spec.max_steps == MAX_STEPS
    env = world("reach:reach_blue", max_steps=7)
    assert tuple(env.spec.tasks) == ("reach_blue",) and env.spec.max_steps == 7


@pytest.mark.parametrize(
    ("name", "settings", "cameras", "said"),
    [
        ("reech", {}, None, "--env reech: unknown; there are reach"),
        ("reach:reach_green", {}, None, "has no task 'reach_green'; there are reach_red, reach_blue"),
        ("reach", {}, ("front",), "has no camera 'front' (top, wrist); say which one is the policy's with env.cameras"),
        ("reach", {"cameras": {"front": "left"}}, ("front",), "has no camera 'left'"),
        ("reach", {"cameras": {"front": "top"}}, ("hand",), "env.cameras: the policy looks through 'hand'"),
        ("reach", {"fps": 5.0}, None, "env.fps: is not read by --env reach"),
        ("reach", {"max_mesh_faces": 10}, None, "env.max_mesh_faces: is not read"),
        ("no_such_package_at_all:World", {}, None, "no_such_package_at_all cannot be imported"),
        ("recap_ds.envs.reach:World", {}, None, "recap_ds.envs.reach has no 'World'"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(name, settings, cameras, said):
    with pytest.raises(UsageError) as error:
        open_environment(name, EnvConfig(**settings), cameras)
    assert said in str(error.value) and "\n" not in str(error.value)
