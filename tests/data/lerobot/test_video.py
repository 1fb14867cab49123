import numpy as np
import pytest

from recap_ds.data.lerobot.video import read_video_frames
from recap_ds.errors import UsageError
from tests.data.lerobot.tiny_dataset import FPS, HEIGHT, WIDTH, picture, plain_decode, write_video

NUM_FRAMES = 60
SIDES = (HEIGHT, WIDTH)


@pytest.fixture(scope="module", params=["libx264", "libsvtav1"])
def video(request, tmp_path_factory):
    """An encoded file and its frames as a plain decode from the start gives them."""
    path = tmp_path_factory.mktemp("video") / "file.mp4"
    write_video(path, [picture(0, frame) for frame in range(NUM_FRAMES)], request.param)
    plain = plain_decode(path)
    assert len(plain) == NUM_FRAMES
    return str(path), np.stack(plain)


def read(path: str, frames: list[int]) -> np.ndarray:
    return read_video_frames(path, [frame / FPS for frame in frames], 0.5 / FPS, SIDES)


def test_frames_in_chunks_equal_a_plain_decode(video):
    path, plain = video
    for first in range(0, NUM_FRAMES, 7):
        frames = list(range(first, min(first + 7, NUM_FRAMES)))
        np.testing.assert_array_equal(read(path, frames), plain[frames])


def test_frames_in_any_order_equal_a_plain_decode(video):
    path, plain = video
    frames = np.random.default_rng(0).permutation(NUM_FRAMES).tolist()
    np.testing.assert_array_equal(read(path, frames), plain[frames])
    # The last frame drains the decoder; a seek must revive it.
    np.testing.assert_array_equal(
        read(path, [NUM_FRAMES - 1, 0, NUM_FRAMES - 1, NUM_FRAMES - 1]), plain[[-1, 0, -1, -1]]
    )


def test_a_frame_is_found_by_its_time_and_its_picture_is_the_encoded_one(video):
    path, _ = video
    for frame in (0, 1, 31, NUM_FRAMES - 1):
        assert np.abs(read(path, [frame]).astype(int) - picture(0, frame)).max() <= 6


def test_times_within_half_a_frame_are_accepted_and_others_refused(video):
    path, plain = video
    near = read_video_frames(path, [1.0 + 0.4 / FPS, 1.0 - 0.4 / FPS], 0.5 / FPS, SIDES)
    np.testing.assert_array_equal(near, plain[[10, 10]])
    with pytest.raises(UsageError, match=r"no frame at 1\.0400 s, the next is at 1\.1000"):
        read_video_frames(path, [1.04], 0.1 / FPS, SIDES)


def test_a_time_beyond_the_end_is_refused_and_the_file_still_usable(video):
    path, plain = video
    with pytest.raises(UsageError, match=r"ends before 6\.0000 s"):
        read(path, [NUM_FRAMES])
    np.testing.assert_array_equal(read(path, [5]), plain[[5]])


def test_other_sides_than_promised_are_refused(video):
    path, _ = video
    with pytest.raises(UsageError, match=rf"frames are {HEIGHT}x{WIDTH}, meta/info.json says 32x32"):
        read_video_frames(path, [0.0], 0.05, (32, 32))


def test_a_file_that_is_no_video_is_refused(tmp_path):
    path = tmp_path / "file.mp4"
    path.write_bytes(b"not a video" * 100)
    with pytest.raises(UsageError, match=r"file\.mp4: not decodable"):
        read(str(path), [0])
