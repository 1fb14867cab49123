import pickle

import numpy as np
import pytest

from recap_ds.data.lerobot.metadata import load_metadata
from recap_ds.data.lerobot.reader import ImportOptions, read_episodes
from recap_ds.errors import UsageError
from tests.data.lerobot.tiny_dataset import (
    DATA_FILE,
    FPS,
    TASKS,
    VIDEO_FILE,
    actions,
    edit_column,
    edit_json,
    picture,
    plain_decode,
    states,
    write_dataset,
)

LENGTHS = (15, 7, 11)


def episodes_of(root, source="demo", **options):
    return list(read_episodes(load_metadata(root), ImportOptions(source=source, name="set", **options)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("demo"), LENGTHS)


def test_numbers_tasks_and_names(demo):
    episodes = episodes_of(demo)
    assert [episode.name for episode in episodes] == ["set/0", "set/1", "set/2"]
    assert [episode.task for episode in episodes] == [TASKS[0], TASKS[1], TASKS[0]]
    for index, (episode, length) in enumerate(zip(episodes, LENGTHS, strict=True)):
        np.testing.assert_array_equal(episode.states, states(index, length))
        np.testing.assert_array_equal(episode.actions, actions(index, length))
        assert episode.states.dtype == episode.actions.dtype == np.float32
        assert (episode.prompt, episode.source, episode.fps) == (episode.task, "demo", FPS)
        assert episode.outcome == "success"
        assert episode.human is None
        assert episode.rewards is None


def test_pictures_of_each_episode_come_from_its_span_of_the_video(demo):
    plain = np.stack(plain_decode(demo / VIDEO_FILE))
    first = 0
    for episode in episodes_of(demo):
        reader = pickle.loads(pickle.dumps(episode.read_frames))
        images = reader(list(range(episode.num_frames)))
        assert list(images) == ["top"]
        np.testing.assert_array_equal(images["top"], plain[first : first + episode.num_frames])
        first += episode.num_frames
    assert first == len(plain)


def test_pictures_inside_parquet_are_read_exactly_across_row_groups(tmp_path):
    write_dataset(tmp_path, LENGTHS, stored_as="image", task_column="task")
    for index, episode in enumerate(episodes_of(tmp_path)):
        frames = list(range(episode.num_frames))
        images = pickle.loads(pickle.dumps(episode.read_frames))(frames)
        np.testing.assert_array_equal(images["image"], np.stack([picture(index, frame) for frame in frames]))
        np.testing.assert_array_equal(episode.read_frames([3])["image"][0], picture(index, 3))


@pytest.mark.parametrize("stored_as", ["video", "image"])
def test_a_set_of_many_files_reads_as_one_file_would(tmp_path, stored_as):
    write_dataset(tmp_path / "one", (5, 4, 3, 6, 2), stored_as=stored_as)
    write_dataset(tmp_path / "many", (5, 4, 3, 6, 2), stored_as=stored_as, episodes_per_file=2)
    assert len(list((tmp_path / "many" / "data").glob("*/*.parquet"))) == 3
    pairs = list(zip(episodes_of(tmp_path / "one"), episodes_of(tmp_path / "many"), strict=True))
    assert len(pairs) == 5
    for one, many in pairs:
        assert (one.name, one.task) == (many.name, many.task)
        np.testing.assert_array_equal(one.states, many.states)
        frames = list(range(one.num_frames))
        (wanted,), (found,) = one.read_frames(frames).values(), many.read_frames(frames).values()
        # Video files of other lengths are encoded a little differently.
        assert np.abs(wanted.astype(int) - found).max() <= 8


def test_a_spoiled_picture_inside_parquet_names_episode_camera_and_frame(tmp_path):
    write_dataset(tmp_path, (4, 4), stored_as="image")
    edit_column(tmp_path / DATA_FILE, "observation.image", lambda cells: cells[5].update(bytes=b"junk"))
    episode = episodes_of(tmp_path)[1]
    with pytest.raises(UsageError, match="episode set/1, camera image: frame 1 is not an image"):
        episode.read_frames([0, 1])


def test_a_picture_path_cannot_leave_the_data_set(tmp_path):
    write_dataset(tmp_path / "set", (4,), stored_as="image")
    (tmp_path / "secret.png").write_bytes(b"")
    edit_column(
        tmp_path / "set" / DATA_FILE,
        "observation.image",
        lambda cells: cells[0].update(bytes=None, path="../secret.png"),
    )
    with pytest.raises(UsageError, match="neither image bytes nor a path inside the data set"):
        episodes_of(tmp_path / "set")[0].read_frames([0])


def test_state_columns_are_concatenated_in_the_order_asked_for(tmp_path):
    write_dataset(tmp_path, (6,), columns={"observation.gripper": lambda _, length: [0.5 * t for t in range(length)]})
    (episode,) = episodes_of(tmp_path, state_keys=("observation.gripper", "observation.state"))
    expected = np.concatenate([0.5 * np.arange(6, dtype=np.float32)[:, None], states(0, 6)], axis=1)
    np.testing.assert_array_equal(episode.states, expected)
    with pytest.raises(
        UsageError, match=r"no feature observation\.arm of numbers; choose .* observation\.state, observation\.gripper"
    ):
        episodes_of(tmp_path, state_keys=("observation.arm",))


def test_action_columns_are_concatenated_too(tmp_path):
    write_dataset(tmp_path, (6,), columns={"action.gripper": lambda _, length: [float(t) for t in range(length)]})
    (episode,) = episodes_of(tmp_path, action_keys=("action", "action.gripper"))
    np.testing.assert_array_equal(episode.actions, np.column_stack([actions(0, 6), np.arange(6, dtype=np.float32)]))
    with pytest.raises(UsageError, match=r"no feature act of numbers; choose with --action-keys from: action, action"):
        episodes_of(tmp_path, action_keys=("act",))


def test_broken_episodes_can_be_left_out(tmp_path):
    write_dataset(tmp_path, LENGTHS)
    spoil("action", 16, [1.0, float("nan")])(tmp_path)
    metadata = load_metadata(tmp_path, skip_episodes=(1,))
    episodes = read_episodes(metadata, ImportOptions(source="demo", name="set"))
    assert [episode.name for episode in episodes] == ["set/0", "set/2"]
    with pytest.raises(UsageError, match="--skip-episodes: leaves no episode"):
        load_metadata(tmp_path, skip_episodes=(0, 1, 2))
    with pytest.raises(UsageError, match=r"--skip-episodes: .* lists no episode 17 among its 3"):
        load_metadata(tmp_path, skip_episodes=(1, 17))


@pytest.mark.parametrize("text", ["", " ", None])
def test_a_task_without_words_needs_some(tmp_path, text):
    write_dataset(tmp_path, LENGTHS)
    edit_column(tmp_path / "meta/tasks.parquet", "__index_level_0__", lambda values: values.__setitem__(1, text))
    with pytest.raises(UsageError, match="episode set/1: task 1 has no text in meta/tasks; give it one with --task"):
        episodes_of(tmp_path)
    assert {episode.prompt for episode in episodes_of(tmp_path, task="open it")} == {"open it"}


def test_targets_become_changes_in_the_dims_asked_for(demo):
    first, *_ = episodes_of(demo, absolute_actions=True, delta_dims=(1,))
    expected = actions(0, LENGTHS[0])
    expected[:, 1] -= states(0, LENGTHS[0])[:, 1]
    np.testing.assert_array_equal(first.actions, expected)


def test_resampling_takes_the_nearest_frames_and_keeps_every_reward(tmp_path):
    write_dataset(tmp_path, (11,), columns={"next.reward": lambda _, length: [float(t) for t in range(length)]})
    (episode,) = episodes_of(tmp_path, fps=4.0, absolute_actions=True)
    # 10 / 4 = 2.5 native frames per frame: 0, 2.5, 5, 7.5, 10 with halves going up.
    kept = [0, 3, 5, 8, 10]
    np.testing.assert_array_equal(episode.states, states(0, 11)[kept])
    np.testing.assert_array_equal(episode.actions, actions(0, 11)[kept])
    np.testing.assert_array_equal(episode.rewards, [0 + 1 + 2, 3 + 4, 5 + 6 + 7, 8 + 9, 10])
    assert episode.fps == 4.0
    plain = plain_decode(tmp_path / VIDEO_FILE)
    np.testing.assert_array_equal(episode.read_frames([0, 1, 2, 3, 4])["top"], np.stack([plain[k] for k in kept]))


def test_resampling_at_the_native_rate_changes_nothing(demo):
    (first, *_) = episodes_of(demo, fps=float(FPS), absolute_actions=True)
    np.testing.assert_array_equal(first.states, states(0, LENGTHS[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 5.0}, "add --absolute-actions"),
        ({"delta_dims": (0,)}, "add --absolute-actions"),
        ({"delta_dims": (0,), "absolute_actions": True, "fps": 5.0}, "give one of them"),
        ({"delta_dims": (0, 2), "absolute_actions": True}, "2 action and 3 state dims, so 0 to 1 can be taken"),
        ({"fps": 20.0, "absolute_actions": True}, "at most the data set's 10"),
        ({"fps": 0.0, "absolute_actions": True}, "above 0"),
    ],
)
def test_options_are_refused_where_it_would_change_the_motion(demo, options, message):
    with pytest.raises(UsageError, match=message):
        episodes_of(demo, **options)


def spoil(name, place, value):
    """Overwrite one cell of the data file; ``place`` counts rows of all episodes."""
    return lambda root: edit_column(root / DATA_FILE, name, lambda values: values.__setitem__(place, value))


def feature(name, **changes):
    return lambda root: edit_json(root / "meta/info.json", lambda info: info["features"][name].update(changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("action", 16, [1.0, float("nan")]), r"episode set/1, frame 1: action\[1\] is nan"),
        (
            spoil("observation.state", 22, [0.0, float("inf"), 0.0]),
            r"episode set/2, frame 0: observation\.state\[1\] is inf",
        ),
        (spoil("observation.state", 22, [0.0]), "rows of 1 and of 3 numbers"),
        (spoil("observation.state", 22, None), "observation.state has 1 empty values"),
        (spoil("frame_index", 17, 9), "episode 1 has frame_index 9 at its row 2; frames must run from 0 without gaps"),
        (spoil("episode_index", 15, 0), "episode 0 has 16 rows, meta/episodes says 15"),
        (spoil("episode_index", 2, 1), "followed by an earlier one's"),
        (spoil("timestamp", 3, 0.5), r"episode set/0, frame 3: timestamp 0\.5000 s, at 10 fps it should be 0\.3000"),
        (spoil("task_index", 3, 1), r"episode set/0: has tasks \[0, 1\]; RECAP needs one task per episode"),
        (spoil("task_index", slice(0, 15), [7] * 15), "episode set/0: task_index 7 is not in meta/tasks"),
        (
            feature("action", shape=[5]),
            r"episode set/0: action has 2 numbers per frame, meta/info.json says shape \[5\]",
        ),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, change, message):
    write_dataset(tmp_path, LENGTHS)
    change(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        episodes_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_data_set_without_actions_is_refused(tmp_path):
    write_dataset(tmp_path, (3,))
    edit_json(tmp_path / "meta/info.json", lambda info: info["features"].pop("action"))
    with pytest.raises(UsageError, match="no feature action of numbers; choose with --action-keys from: none"):
        episodes_of(tmp_path)
