"""Meta-World behind the common interface; skipped where the package or a renderer is missing."""

import os

import numpy as np
import pytest

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.errors import UsageError

os.environ.setdefault("MUJOCO_GL", "egl")  # as envs/packages.py does, before mujoco is imported
pytest.importorskip("metaworld", reason="pip install 'recap_ds[metaworld]'")

BUTTON = "metaworld:button-press-topdown-v3"


def world(name=BUTTON, **settings):
    return open_environment(name, EnvConfig(**{"image_size": 48, "max_mesh_faces": 1500, **settings}))


@pytest.fixture(scope="module")
def cameras():
    """All cameras of one scene, at a size that shows it."""
    env = world(cameras={c: c for c in ("corner", "corner2", "corner3", "corner4", "topview", "gripperPOV")})
    try:
        env.reset(0, "button-press-topdown-v3")
        pictures = env.images()
    except UsageError as error:
        pytest.skip(str(error))
    yield pictures
    env.close()


def play(env, task, seed, num_frames):
    env.reset(seed, task)
    states, success = [env.state()], False
    for _ in range(num_frames):
        success |= env.step(env.expert_action()).success
        states.append(env.state())
    return np.array(states), success


@pytest.mark.parametrize("task", ["reach-v3", "button-press-topdown-v3", "push-v3", "drawer-open-v3", "window-open-v3"])
def test_experts_succeed_and_a_seed_fixes_the_episode_whatever_was_played_before(task):
    first, second = world(f"metaworld:{task}"), world(f"metaworld:{task}")
    play(second, task, 1, 40)
    states, success = play(first, task, 5, 120)
    again, _ = play(second, task, 5, 120)
    np.testing.assert_array_equal(states, again)
    assert success and not np.array_equal(states, play(first, task, 6, 120)[0])


@pytest.mark.parametrize("task", ["reach-v3", "window-open-v3", "coffee-pull-v3"])
def test_the_first_look_is_at_this_episode(task):
    """Meta-World's own reset leaves objects and goal, to the eye and to the expert, where the draw before put them."""
    env = world(f"metaworld:{task}", cameras={"top": "topview"})
    env.reset(5, task)
    state, action, picture = env.state(), env.expert_action(), env.images()["top"]
    inner = env._world
    places = inner.data.site_xpos.copy(), inner.data.xpos.copy()
    env._mujoco.mj_forward(inner.model, inner.data)
    np.testing.assert_array_equal(picture, env.images()["top"])
    for before, after in zip(places, (inner.data.site_xpos, inner.data.xpos), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-12)
    env._full_state = inner._get_obs()
    np.testing.assert_array_equal(state, env.state())
    np.testing.assert_array_equal(action, env.expert_action())
    if task == "reach-v3":
        np.testing.assert_allclose(inner.data.site("goal").xpos, inner._target_pos, atol=1e-6)
    env.close()


def test_what_a_policy_knows_of_it():
    spec = world("metaworld:reach-v3,push-back-v3").spec
    assert spec.tasks == {"reach-v3": "reach", "push-back-v3": "push back"}
    assert (spec.state_dim, spec.action_dim, spec.fps, spec.max_steps) == (4, 4, 80.0, 500)
    assert spec.cameras == ("corner2",) and spec.has_expert


def test_the_time_limit_may_exceed_its_own():
    env = world("metaworld:reach-v3", max_steps=520)
    env.reset(0, "reach-v3")
    results = [env.step(np.zeros(4, np.float32)) for _ in range(510)]
    assert not any(result.terminated for result in results)


def test_pictures_are_upright(cameras):
    """The button's box stands on the table: seen from any corner its yellow is above its own dark foot."""
    for name in ("corner", "corner2", "corner3", "corner4"):
        picture = cameras[name].astype(int)
        yellow = (picture[:, :, 0] > 150) & (picture[:, :, 1] > 100) & (picture[:, :, 2] < 80)
        red = (picture[:, :, 0] > 120) & (picture[:, :, 1] < 60) & (picture[:, :, 2] < 60)
        assert yellow.sum() > 3, name
        if red.sum() > 1:  # the button itself, on top of the box
            assert np.nonzero(red)[0].mean() < np.nonzero(yellow)[0].mean(), name


def test_drawing_does_not_touch_the_physics(cameras):
    plain, drawn = world(), world()
    task = "button-press-topdown-v3"
    plain.reset(3, task)
    drawn.reset(3, task)
    for _ in range(30):
        drawn.images()
        plain.step(plain.expert_action())
        drawn.step(drawn.expert_action())
        np.testing.assert_array_equal(plain.state(), drawn.state())
    drawn.close()


def test_wrong_names_end_in_one_line():
    for name, said in (
        ("metaworld:reach-v2", "has no task 'reach-v2'; there are assembly-v3"),
        ("metaworld:", "name a task"),
        ("metaworld", "name a task"),
    ):
        with pytest.raises(UsageError, match=said):
            world(name)
    with pytest.raises(UsageError, match="has no camera 'front'"):
        world(cameras={"front": "front"})
