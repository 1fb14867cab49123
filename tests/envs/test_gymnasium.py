"""Environments with gymnasium's calls; the package itself is needed for registered ids alone."""

import numpy as np
import pytest

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.errors import UsageError

CART = "tests.envs.fake_world:Cart"
FOUND = {"state_key": "agent/place", "cameras": {"front": "eye", "top": "render"}, "image_size": 32}


def world(**settings):
    return open_environment(CART, EnvConfig(**{**FOUND, **settings}))


def test_what_it_says_of_itself_is_used():
    spec = world().spec
    assert (spec.state_dim, spec.action_dim, spec.fps, spec.max_steps) == (2, 1, 20, 6)
    assert spec.tasks == {CART: "Cart"} and not spec.has_expert
    assert spec.action_low.tolist() == [-1.0] and spec.action_high.tolist() == [2.0]


def test_settings_come_before_what_it_says():
    spec = world(fps=5.0, max_steps=9, options={"bound": 4}).spec
    assert (spec.fps, spec.max_steps, spec.action_high.tolist()) == (5.0, 9, [4.0])


def test_an_episode():
    env = world()
    env.reset(5, CART)
    start = float(np.random.default_rng(5).uniform(0, 0.5))
    np.testing.assert_allclose(env.state(), [start, 1.0], rtol=1e-6)
    result = env.step(np.array([1.0]))
    assert not result.success and not result.terminated and env.progress() == result.reward > start
    pictures = env.images()
    assert pictures["front"].shape == pictures["top"].shape == (32, 32, 3)
    # The rendered picture is wide: black above and below, itself in the middle.
    assert pictures["top"][0].max() == 0 and pictures["top"][16].min() == 7
    result = env.step(np.array([2.0]))
    assert result.success and result.terminated


def test_a_truncated_episode_is_over_and_no_success():
    env = world()
    env.reset(0, CART)
    env.step(np.array([-1.0]))
    result = env.step(np.array([-1.0]))
    assert (result.success, result.terminated, result.truncated) == (False, False, True)


def test_success_may_be_the_end_itself_or_another_key():
    for key, expected in (("terminated", True), ("other", True)):
        env = world(success_key=key, options={"length": 0.5})
        env.reset(0, CART)
        assert env.step(np.array([1.0])).success is expected


def test_only_what_is_looked_at_is_rendered():
    env = world()
    rendered = env._world.num_renders
    env.reset(0, CART)
    env.step(np.array([1.0]))
    assert env._world.num_renders == rendered
    env.images()
    assert env._world.num_renders == rendered + 1
    env.close()
    assert env._world.closed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"state_key": None}, "env.state_key: None is no vector of numbers"),
        ({"state_key": "agent/speed"}, "has no 'agent/speed'; its keys are ['agent', 'eye', 'name'], and 'render'"),
        ({"state_key": "name"}, "env.state_key: 'name' is no vector of numbers"),
        (
            {"cameras": {"front": "ear"}},
            "env.cameras.front: the observation of tests.envs.fake_world:Cart has no 'ear'",
        ),
        ({"cameras": {"front": "agent/place"}}, "'agent/place' of tests.envs.fake_world:Cart is no uint8"),
        ({"options": {"tells": False}}, "env.fps: tests.envs.fake_world:Cart does not say; give env.fps=NUMBER"),
        ({"options": {"tells": False}, "fps": 3.0}, "env.max_steps"),
        ({"options": {"discrete": True}}, "its actions are Discrete(4)"),
        ({"options": {"endless": True}}, "acts in a bounded vector"),
        ({"options": {"wings": 2}}, "its arguments are env.options"),
        ({"options": {"blind": True}}, "Cart does not render; give env.options.render_mode=rgb_array"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(settings, said):
    with pytest.raises(UsageError) as error:
        world(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_success_key_is_said_at_the_first_step():
    env = world(success_key="won")
    env.reset(0, CART)
    with pytest.raises(UsageError, match=r"has no 'won' \(it has \['is_success', 'other'\]"):
        env.step(np.array([0.1]))
