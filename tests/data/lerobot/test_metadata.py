import pytest

from recap_ds.data.lerobot.metadata import camera_name, load_metadata
from recap_ds.errors import UsageError
from tests.data.lerobot.tiny_dataset import (
    DATA_FILE,
    EPISODES_FILE,
    HEIGHT,
    TASKS,
    VIDEO_FILE,
    WIDTH,
    edit_column,
    edit_json,
    write_dataset,
)

CAMERA = "observation.images.top"


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "set", (4, 6))


def edit_info(root, **changes):
    edit_json(root / "meta/info.json", lambda info: info.update(changes))


def test_what_a_whole_data_set_says(root):
    metadata = load_metadata(root)
    assert (metadata.fps, metadata.num_frames) == (10.0, 10)
    assert metadata.tasks == dict(enumerate(TASKS))
    (camera,) = metadata.cameras
    assert (camera.key, camera.name, camera.stored_as) == (CAMERA, "top", "video")
    assert (camera.height, camera.width) == (HEIGHT, WIDTH)
    second = metadata.episodes[1]
    assert (second.index, second.num_frames, second.data_path) == (1, 6, root / DATA_FILE)
    assert second.videos[CAMERA].path == root / VIDEO_FILE
    assert second.videos[CAMERA].from_seconds == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("observation.images.corner2", "corner2"),
        ("observation.image", "image"),
        ("observation.images.wrist.left", "wrist_left"),
        ("observation.wrist_image", "wrist_image"),
        ("observation.images.cam high", "cam_high"),
    ],
)
def test_camera_names_have_no_dots(key, name):
    assert camera_name(key) == name


@pytest.mark.parametrize("names", [["channels", "height", "width"], ["channel", "height", "width"], None])
def test_channels_may_come_first(root, names):
    def change(info):
        info["features"][CAMERA].update(shape=[3, HEIGHT, WIDTH], names=names)

    edit_json(root / "meta/info.json", change)
    (camera,) = load_metadata(root).cameras
    assert (camera.height, camera.width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "shape",
    [["a", "b", 3], [8, 8.5, 3], [True, 8, 3], [0, 8, 3], [8, -8, 3], [8, 8], [8, 8, 4], [[3], 8, 3], 3, "883", None],
)
def test_a_camera_of_no_size_is_refused(root, shape):
    edit_json(root / "meta/info.json", lambda info: info["features"][CAMERA].update(shape=shape))
    with pytest.raises(UsageError, match=rf"info\.json: {CAMERA} has shape .*; a camera is \[height, width, 3\]"):
        load_metadata(root)


def test_depth_maps_are_left_out_and_named(root):
    depth = {"dtype": "video", "shape": [8, 8, 1], "names": None, "info": {"video.is_depth_map": True}}
    edit_json(root / "meta/info.json", lambda info: info["features"].update({"observation.images.depth": depth}))
    metadata = load_metadata(root)
    assert [camera.name for camera in metadata.cameras] == ["top"]
    assert metadata.left_out_cameras == ("observation.images.depth",)


@pytest.mark.parametrize("version", ["v4.0", "v1.6", None, 5])
def test_other_formats_are_refused(root, version):
    edit_info(root, codebase_version=version)
    with pytest.raises(UsageError, match=rf"format {version}, this importer reads v3\.0, v2\.1 and v2\.0; convert"):
        load_metadata(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "fps is missing"),
        ({"fps": 0}, "fps is 0"),
        ({"features": []}, "features is missing"),
        ({"features": {}}, "at least one camera"),
        ({"total_episodes": 3}, "holds 2 where meta/info.json says total_episodes 3"),
        ({"total_frames": 9}, "holds 10 where meta/info.json says total_frames 9"),
        ({"video_path": "videos/{camera}.mp4"}, "video_path .* is not a path template"),
        ({"video_path": None}, "video_path None is not a path template"),
        ({"data_path": "data/{chunk_index:03d}.parquet"}, r"data/000\.parquet: no such file, episode 0 needs it"),
    ],
)
def test_info_that_does_not_fit_is_refused(root, changes, message):
    edit_info(root, **changes)
    with pytest.raises(UsageError, match=message) as caught:
        load_metadata(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["meta/info.json", "meta/tasks.parquet", EPISODES_FILE, DATA_FILE, VIDEO_FILE])
def test_a_missing_file_is_named(root, missing):
    (root / missing).unlink()
    with pytest.raises(UsageError, match=missing if missing != EPISODES_FILE else "meta/episodes: no"):
        load_metadata(root)


def test_a_spoiled_file_is_named(root):
    (root / EPISODES_FILE).write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"file-000\.parquet: not readable as parquet"):
        load_metadata(root)
    (root / "meta/info.json").write_text("{")
    with pytest.raises(UsageError, match=r"info\.json: not valid JSON"):
        load_metadata(root)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("length", [4, 5], "episode 1 has length 5 but rows 4 to 10"),
        ("episode_index", [1, 1], "episode 1 stands there twice"),
        (f"videos/{CAMERA}/to_timestamp", [0.4, 0.9], r"episode 1 has 6 frames, its video .* only 5\.0"),
        (f"videos/{CAMERA}/from_timestamp", [0.0, None], "episode 1 has no videos/.*from_timestamp"),
    ],
)
def test_episodes_that_contradict_themselves_are_refused(root, column, values, message):
    edit_column(root / EPISODES_FILE, column, lambda cells: cells.__setitem__(slice(None), values))
    with pytest.raises(UsageError, match=message):
        load_metadata(root)


def test_a_camera_at_another_rate_is_refused(root):
    edit_json(root / "meta/info.json", lambda info: info["features"][CAMERA].update(info={"video.fps": 30}))
    with pytest.raises(UsageError, match="camera top runs at 30 fps, the data set at 10"):
        load_metadata(root)


def test_cameras_that_differ_in_case_only_need_names(root):
    def change(info):
        info["features"]["observation.images.TOP"] = {"dtype": "image", "shape": [8, 9, 3]}

    edit_json(root / "meta/info.json", change)
    with pytest.raises(UsageError, match="both become camera 'TOP'; name them with --camera"):
        load_metadata(root)
    metadata = load_metadata(root, {"front": CAMERA, "wrist": "observation.images.TOP"})
    assert [(camera.name, camera.height) for camera in metadata.cameras] == [("front", HEIGHT), ("wrist", 8)]


def test_chosen_cameras_are_the_only_ones_read(root):
    # One that no shard could hold, and that nobody asked for.
    thermal = {"dtype": "image", "shape": [8, 8, 1]}
    edit_json(root / "meta/info.json", lambda info: info["features"].update({"observation.images.thermal": thermal}))
    with pytest.raises(UsageError, match="thermal has shape"):
        load_metadata(root)
    metadata = load_metadata(root, {"front": "top"})
    assert [(camera.name, camera.key) for camera in metadata.cameras] == [("front", CAMERA)]
    assert metadata.left_out_cameras == ("observation.images.thermal",)
    with pytest.raises(UsageError, match=f"--camera a=side: no such camera; the data set has {CAMERA}, "):
        load_metadata(root, {"a": "side"})
