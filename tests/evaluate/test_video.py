import sys

import av
import numpy as np
import pytest

from recap_ds.errors import UsageError
from recap_ds.evaluate.video import BLUE, CURVE, GREEN, HEADER, RED, SIDE, check_encoder, draw_frame, write_video
from recap_ds.rollout.episode import EpisodePlan, PlayedEpisode

LEVELS = (40, 200)


def episode(num_frames=10, cameras=("front", "wrist"), success=True):
    flat = {
        camera: np.full((num_frames, 8, 8, 3), level, np.uint8) for camera, level in zip(cameras, LEVELS, strict=False)
    }
    return PlayedEpisode(
        plan=EpisodePlan(4, 0, "task", "pick it up"),
        success=success,
        terminated=True,
        states=np.zeros((num_frames, 2), np.float32),
        actions=np.zeros((num_frames, 2), np.float32),
        rewards=np.zeros(num_frames, np.float32),
        expert=np.arange(num_frames) >= 6,
        pictures=flat,
        num_rendered=num_frames,
    )


def has_color(picture, color):
    return bool((np.abs(picture.astype(int) - color).sum(axis=2) < 6).any())


def test_cameras_lie_side_by_side_under_the_header_and_one_alone_is_centred():
    picture = draw_frame(episode(), 0, [], "title", ended=False)
    assert picture.shape == (HEADER + SIDE + CURVE, 2 * SIDE, 3)
    assert (picture[HEADER : HEADER + SIDE, :SIDE] == LEVELS[0]).all()
    assert (picture[HEADER : HEADER + SIDE, SIDE:] == LEVELS[1]).all()
    alone = draw_frame(episode(cameras=("front",)), 0, [], "title", ended=False)
    assert (alone[HEADER : HEADER + SIDE, SIDE // 2 : -SIDE // 2] == LEVELS[0]).all() and alone.shape == picture.shape


def test_the_curve_is_as_high_as_the_value_and_as_long_as_time():
    values = [(0, -0.75), (5, -0.25)]

    def line(frame):
        curve = draw_frame(episode(), frame, values, "title", ended=False)[HEADER + SIDE :].astype(int)
        rows, columns = np.nonzero(np.abs(curve - BLUE).sum(axis=2) < 6)
        return rows, columns

    rows, columns = line(2)
    quarter = (CURVE - 16) / 4
    np.testing.assert_allclose(rows.mean(), 8 + 3 * quarter, atol=1)  # -0.75, from the top
    later_rows, later_columns = line(9)
    assert columns.max() < later_columns.max() and columns.min() == later_columns.min()
    assert abs(later_rows.min() - (8 + quarter)) <= 1.5  # -0.25
    assert not has_color(draw_frame(episode(), 9, [], "title", ended=False)[HEADER + SIDE :], BLUE)


def test_who_acts_and_how_it_ended_is_in_the_header():
    def header(played, frame, ended):
        return draw_frame(played, frame, [], "title", ended)[:HEADER]

    acting, correcting = header(episode(), 0, False), header(episode(), 7, False)
    assert has_color(acting, BLUE) and not has_color(correcting, BLUE)
    assert has_color(header(episode(), 9, True), GREEN) and has_color(header(episode(success=False), 9, True), RED)


@pytest.mark.parametrize(("fps", "num_frames"), [(10.0, 9 + 10), (80.0, 3 + 27)])
def test_a_film_runs_in_the_robot_s_time(tmp_path, fps, num_frames):
    path = tmp_path / "new" / "film.mp4"
    write_video(path, episode(), [(0, -0.5)], "title", fps)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate)
    # The first nine frames, thinned out above 30 a second, and the last one for a second.
    assert len(frames) == num_frames and rate == min(fps, 27.0)
    assert abs(int(frames[0][HEADER + SIDE // 2, SIDE // 2, 0]) - LEVELS[0]) < 6


def test_no_encoder_is_said_before_anything_is_played(monkeypatch):
    check_encoder()
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(UsageError, match="cannot write H"):
        check_encoder()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match="pip install av"):
        check_encoder()
