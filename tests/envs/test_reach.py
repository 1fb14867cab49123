import numpy as np

from recap_ds.envs.reach import STEP, Scene, move, render, sample_scene

SCENE = Scene("reach_red", start=np.zeros(2), targets=np.array([[0.5, 0.5], [-0.5, 0.0]]))


def test_actions_are_velocities_clipped_to_the_unit_square_and_the_arena():
    position, velocity = move(np.array([0.0, 0.5]), np.array([2.0, -0.5]))
    np.testing.assert_allclose(position, [STEP, 0.5 - 0.5 * STEP])
    np.testing.assert_allclose(velocity, [1.0, -0.5])
    position, velocity = move(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    np.testing.assert_allclose([*position, *velocity], [1.0, 0.0, 0.0, 0.0])


def test_red_green_and_blue_lie_where_the_scene_says():
    picture = render(np.zeros(2), SCENE, "top", 64).astype(int)
    assert picture.shape == (64, 64, 3)
    # World (x, y) to row and column: y up, the view is 1.1 to each side.
    for (x, y), channel in (((0.5, 0.5), 0), ((-0.5, 0.0), 2)):
        row, column = int((1 - y / 1.1) * 32), int((1 + x / 1.1) * 32)
        assert picture[row, column].argmax() == channel and np.ptp(picture[row, column]) > 100
    assert picture[32, 32].max() < 50
    assert picture[0, 0].min() > 200


def test_both_targets_and_the_point_are_always_in_view():
    for seed in range(50):
        scene = sample_scene(np.random.default_rng(seed))
        picture = render(scene.start, scene, "top", 64).astype(int)
        red = ((picture[:, :, 0] - picture[:, :, 2]) > 100).sum()
        blue = ((picture[:, :, 2] - picture[:, :, 0]) > 100).sum()
        point = (picture.max(axis=2) < 50).sum()
        assert min(red, blue) > 50 and point > 10


def test_the_wrist_camera_moves_with_the_point():
    near = render(np.array([0.5, 0.3]), SCENE, "wrist", 64)
    np.testing.assert_array_equal(near[32, 32], [25, 25, 25])
    moved = Scene("reach_red", start=np.zeros(2), targets=SCENE.targets + 0.25)
    np.testing.assert_array_equal(near, render(np.array([0.75, 0.55]), moved, "wrist", 64))
