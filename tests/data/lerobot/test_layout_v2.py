import numpy as np
import pytest

from recap_ds.data.lerobot.metadata import load_metadata
from recap_ds.data.lerobot.reader import ImportOptions, read_episodes
from recap_ds.errors import UsageError
from tests.data.lerobot.tiny_dataset import VIDEO_KEY, edit_json, write_dataset

LENGTHS = (6, 4, 5)
SUCCESS = {"next.success": lambda episode, length: [episode == 1 and t == length - 1 for t in range(length)]}


def episodes_of(root, source="auto"):
    return list(read_episodes(load_metadata(root), ImportOptions(source=source, name="set")))


@pytest.mark.parametrize("stored_as", ["video", "image"])
def test_the_same_data_as_v21_and_as_v30_gives_identical_episodes(tmp_path, stored_as):
    # One episode per video file in both, so that the encoder is given the same.
    written = {"lengths": LENGTHS, "columns": SUCCESS, "stored_as": stored_as}
    old = episodes_of(write_dataset(tmp_path / "old", version="v2.1", **written))
    new = episodes_of(write_dataset(tmp_path / "new", episodes_per_file=1, **written))
    assert [episode.outcome for episode in old] == ["failure", "success", "failure"]
    for one, other in zip(old, new, strict=True):
        assert (one.name, one.task, one.outcome, one.fps) == (other.name, other.task, other.outcome, other.fps)
        assert one.origin == other.origin.replace("new, LeRobot v3.0", "old, LeRobot v2.1")
        np.testing.assert_array_equal(one.states, other.states)
        np.testing.assert_array_equal(one.actions, other.actions)
        frames = list(range(one.num_frames))
        for images, others in zip(one.read_frames(frames).values(), other.read_frames(frames).values(), strict=True):
            np.testing.assert_array_equal(images, others)


def test_files_of_an_episode_are_found_by_chunk(tmp_path):
    metadata = load_metadata(write_dataset(tmp_path, LENGTHS, version="v2.1"))
    assert metadata.version == "v2.1" and metadata.num_frames == sum(LENGTHS)
    last = metadata.episodes[2]
    assert last.data_path == tmp_path / "data/chunk-001/episode_000002.parquet"
    assert last.videos[VIDEO_KEY].path == tmp_path / f"videos/chunk-001/{VIDEO_KEY}/episode_000002.mp4"
    assert last.videos[VIDEO_KEY].from_seconds == 0.0


def test_v20_is_read_as_v21_is(tmp_path):
    write_dataset(tmp_path, LENGTHS, version="v2.1")
    edit_json(tmp_path / "meta/info.json", lambda info: info.update(codebase_version="2.0"))
    assert load_metadata(tmp_path).version == "v2.0"


def test_an_episode_without_its_file_can_be_skipped(tmp_path):
    write_dataset(tmp_path, LENGTHS, version="v2.1")
    (tmp_path / "data/chunk-000/episode_000001.parquet").unlink()
    assert [entry.index for entry in load_metadata(tmp_path, skip_episodes=(1,)).episodes] == [0, 2]


def edit_line(root, name, number, line):
    path = root / "meta" / name
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: edit_line(root, "episodes.jsonl", 1, "{"), r"episodes\.jsonl, line 2: not valid JSON"),
        (lambda root: edit_line(root, "episodes.jsonl", 1, "[1]"), r"line 2: episode_index is missing or no whole"),
        (
            lambda root: edit_line(root, "episodes.jsonl", 0, '{"episode_index": 0, "length": "6"}'),
            r"episodes\.jsonl, line 1: length is missing or no whole number",
        ),
        (
            lambda root: edit_line(root, "episodes.jsonl", 0, '{"episode_index": 0, "length": 0}'),
            "episode 0 has length 0",
        ),
        (
            lambda root: edit_line(root, "episodes.jsonl", 1, '{"episode_index": 0, "length": 4}'),
            "episode 0 stands there twice",
        ),
        (lambda root: (root / "meta/episodes.jsonl").write_text(""), "lists no episode"),
        (lambda root: edit_line(root, "tasks.jsonl", 0, '{"task_index": 0}'), r"tasks\.jsonl, line 1: task is missing"),
        (lambda root: (root / "meta/tasks.jsonl").unlink(), r"tasks\.jsonl: cannot be read"),
        (
            lambda root: (root / "data/chunk-001/episode_000002.parquet").unlink(),
            r"episode_000002\.parquet: no such file, episode 2 needs it",
        ),
        (
            lambda root: edit_json(root / "meta/info.json", lambda info: info.update(chunks_size=0)),
            "chunks_size is 0, it must be a whole number above 0",
        ),
        (
            lambda root: edit_json(root / "meta/info.json", lambda info: info.update(data_path="../x.parquet")),
            "leads out of the data set",
        ),
    ],
)
def test_what_is_broken_is_named_in_one_line(tmp_path, change, message):
    write_dataset(tmp_path, LENGTHS, stored_as="image", version="v2.1")
    change(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        load_metadata(tmp_path)
    assert "\n" not in str(caught.value)
