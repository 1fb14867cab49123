"""PushT behind the common interface; skipped where the package is missing."""

import numpy as np
import pytest

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.errors import UsageError

pytest.importorskip("gym_pusht", reason="pip install 'recap_ds[pusht]'")


def world(**settings):
    return open_environment("pusht", EnvConfig(**settings))


def test_the_pusher_goes_where_it_is_told_and_only_a_look_draws():
    env = world(image_size=64)
    env.reset(3, "pusht")
    start = env.state().copy()
    goal = np.clip(start + 40, 0, 512).astype(np.float32)
    for _ in range(10):
        result = env.step(goal)
    assert np.linalg.norm(env.state() - goal) < 5 < np.linalg.norm(start - goal)
    assert not result.success and 0.0 <= env.progress() < 0.95
    picture = env.images()["top"]
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    # The pusher is drawn in blue where the state says: x to the right, y down.
    blue = (picture[:, :, 2].astype(int) - picture[:, :, 0]) > 80
    rows, columns = np.nonzero(blue)
    np.testing.assert_allclose([columns.mean(), rows.mean()], env.state() / 8, atol=2.5)


def test_a_seed_fixes_the_episode():
    first, second = world(), world()
    second.reset(8, "pusht")
    second.step(np.array([100.0, 100.0]))
    for env in (first, second):
        env.reset(5, "pusht")
        for target in (100.0, 300.0, 200.0):
            env.step(np.array([target, 400.0]))
    np.testing.assert_array_equal(first.state(), second.state())
    assert first.progress() == second.progress()


def test_what_it_lacks_is_said():
    assert not world().spec.has_expert
    with pytest.raises(UsageError, match="has no scripted expert"):
        world().expert_action()
    with pytest.raises(UsageError, match="has no camera 'wrist'"):
        world(cameras={"wrist": "wrist"})
