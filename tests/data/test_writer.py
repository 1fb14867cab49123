import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from recap_ds.data import writer
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from recap_ds.processing.images import decode_jpeg
from tests.data.made_episodes import BrokenFrames, FlatFrames, grey_of, made_episode, read_back, write


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_every_number_comes_back(tmp_path):
    rewards = np.arange(7, dtype=np.float32) / 8
    write(tmp_path, [made_episode(3, rewards=rewards)])
    samples = read_back(tmp_path)
    assert [sample.record.frame for sample in samples] == list(range(7))
    for t, sample in enumerate(samples):
        valid, k = 7 - t, min(3, 7 - t)
        assert (sample.record.num_valid, sample.record.next_offset) == (valid, k)
        np.testing.assert_array_equal(sample.array("state"), [t, 3])
        stored = min(valid, 4)
        expected = np.zeros((4, 3), dtype=np.float32)
        expected[:stored] = [[t + i + 1, 4, -1] for i in range(stored)]
        np.testing.assert_array_equal(sample.array("actions"), expected)
        np.testing.assert_array_equal(sample.array("rewards")[:stored], rewards[t : t + stored])
        assert abs(int(decode_jpeg(sample.members["top.jpg"])[8, 8, 0]) - grey_of(t)) <= 2
        assert ("top.next.jpg" in sample.members) == ("next_state.npy" in sample.members) == (t + k < 7)
        if t + k < 7:
            np.testing.assert_array_equal(sample.array("next_state"), [t + k, 3])
            assert abs(int(decode_jpeg(sample.members["top.next.jpg"])[8, 8, 0]) - grey_of(t + k)) <= 2
        record = sample.record
        assert (record.source, record.control, record.outcome, record.fps) == ("demo", "human", "success", 10.0)
        assert (record.episode, record.task, record.prompt) == ("set/3", "sort", "sort the blocks")
    assert verify_shards(tmp_path) == []


def test_no_chunk_crosses_a_change_of_control(tmp_path):
    human = np.array([0, 0, 1, 1, 1, 0, 0], dtype=bool)
    report = write(tmp_path, [made_episode(source="intervention", human=human)])
    samples = read_back(tmp_path)
    assert [sample.record.source for sample in samples] == ["intervention" if acts else "auto" for acts in human]
    assert [sample.record.control for sample in samples] == ["human" if acts else "policy" for acts in human]
    assert [sample.record.num_valid for sample in samples] == [2, 1, 3, 2, 1, 2, 1]
    for sample in samples:
        assert sample.shard.startswith(sample.record.source)
        assert not sample.array("actions")[sample.record.num_valid :].any()
        # Before a change of control the window ends there, and looks at the first frame under the other.
        last = sample.record.frame + sample.record.next_offset == 7
        assert ("next_state.npy" in sample.members) != last
    assert report.manifest.counts["auto"].frames == 4
    assert report.manifest.counts["intervention"].human_frames == 3


def test_a_truncated_end_bootstraps_at_the_last_frame(tmp_path):
    write(tmp_path, [made_episode(source="auto", outcome="truncated")])
    samples = read_back(tmp_path)
    assert [sample.record.next_offset for sample in samples] == [3, 3, 3, 3, 2, 1, 0]
    assert [sample.array("next_state")[0] for sample in samples[3:6]] == [6, 6, 6]
    assert "next_state.npy" not in samples[6].members and "top.next.jpg" not in samples[6].members


@pytest.mark.parametrize("outcome", ["success", "unknown"])
def test_an_episode_of_one_frame(tmp_path, outcome):
    write(tmp_path, [made_episode(num_frames=1, outcome=outcome)], action_width=9, td_horizon=9)
    (sample,) = read_back(tmp_path)
    assert sample.record.next_offset == (1 if outcome == "success" else 0)
    assert sample.array("actions").shape == (9, 3) and not sample.array("actions")[1:].any()
    assert verify_shards(tmp_path) == []


def test_stride_thins_the_starts_and_nothing_else(tmp_path):
    human = np.zeros(20, dtype=bool)
    human[8:13] = True
    episode = made_episode(num_frames=20, source="intervention", human=human)
    write(tmp_path / "all", [episode])
    write(tmp_path / "thin", [episode], stride=4)
    every = {sample.key: sample for sample in read_back(tmp_path / "all")}
    thin = read_back(tmp_path / "thin")
    assert [sample.record.frame for sample in thin] == [0, 4, 8, 12, 13, 17]
    for sample in thin:
        assert sample.members == every[sample.key].members
    counts = [Manifest.load(tmp_path / name).counts for name in ("all", "thin")]
    assert [count["intervention"].frames for count in counts] == [5, 5]
    assert [count["auto"].frames for count in counts] == [15, 15]
    assert verify_shards(tmp_path / "thin") == []


def test_without_next_observations(tmp_path):
    report = write(tmp_path, [made_episode()], store_next=False)
    assert not report.manifest.has_next
    assert not any("next" in suffix for sample in read_back(tmp_path) for suffix in sample.members)
    assert [sample.record.next_offset for sample in read_back(tmp_path)] == [3, 3, 3, 3, 3, 2, 1]
    assert verify_shards(tmp_path) == []


def test_stock_webdataset_reads_the_shards(tmp_path):
    import webdataset

    write(tmp_path, [made_episode(i, read_frames=FlatFrames(("top", "wrist"))) for i in range(2)])
    (shard,) = tmp_path.glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert len(samples) == 14
    for sample in samples:
        assert sample["json"]["source"] == "demo" and "." not in sample["__key__"]
        assert sample["actions.npy"].dtype == np.float32 and sample["actions.npy"].shape == (4, 3)
        assert sample["wrist.jpg"].shape == (16, 16, 3)
        assert abs(int(sample["top.jpg"][0, 0, 0]) - grey_of(sample["json"]["frame"])) <= 2


def test_shards_hold_one_source_are_even_and_shuffled(tmp_path):
    report = write(tmp_path, [made_episode(i) for i in range(30)], samples_per_shard=100)
    assert [shard.num_samples for shard in report.manifest.shards] == [70, 70, 70]
    keys = [ShardIndex.load(tmp_path / f"demo-00000{i}.index.npz").keys.tolist() for i in range(3)]
    assert len({key for part in keys for key in part}) == 210
    assert all(len({key.split("-")[1] for key in part}) > 15 for part in keys)
    assert all(part != sorted(part) for part in keys)


def test_the_same_import_gives_the_same_bytes_on_any_number_of_workers(tmp_path):
    episodes = [made_episode(i, num_frames=5 + i) for i in range(6)]
    for name, jobs, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        write(tmp_path / name, episodes, jobs=jobs, seed=seed, samples_per_shard=20)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one") != files_of(tmp_path / "other")


def test_pictures_are_made_square(tmp_path):
    write(tmp_path, [made_episode(read_frames=FlatFrames(shape=(30, 60)))], image_size=20)
    picture = decode_jpeg(read_back(tmp_path)[6].members["top.jpg"]).astype(int)
    assert picture.shape == (20, 20, 3)
    assert picture[:3].max() < 20 and abs(picture[10, 10, 0] - grey_of(6)) <= 3


def test_a_second_import_joins_the_first(tmp_path):
    first = write(tmp_path, [made_episode(i) for i in range(2)]).manifest
    others = [made_episode(i, 9, name=f"new/{i}", task="a", prompt="first by name", source="auto") for i in range(2)]
    write(tmp_path, others, dataset="new")
    third = [made_episode(0, name="third/0")]
    merged = write(tmp_path, third, dataset="third").manifest
    assert merged == Manifest.load(tmp_path)
    assert [shard.name for shard in merged.shards] == ["demo-000000.tar", "auto-000000.tar", "demo-000001.tar"]
    # A task keeps its id although the new one comes first by name.
    assert list(first.tasks) == ["sort"] and list(merged.tasks) == ["sort", "a"]
    assert (merged.tasks["sort"].episodes, merged.tasks["a"].longest) == (3, 9)
    assert merged.counts["demo"].samples == 21 and merged.statistics["demo"]["state"].count == 21
    np.testing.assert_allclose(merged.statistics["auto"]["actions"].mean, [5.0, 1.5, -1.0])
    assert verify_shards(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({"fps": 20.0}, {}, "fps"),
        ({"states": np.zeros((7, 5))}, {}, "state_dim"),
        ({"actions": np.zeros((7, 5))}, {}, "action_dim"),
        ({"read_frames": FlatFrames(("wrist",))}, {}, "cameras"),
        ({}, {"td_horizon": 2}, "td_horizon"),
        ({}, {"action_width": 5}, "action_width"),
        ({}, {"image_size": 32}, "image_size"),
        ({}, {"store_next": False}, "has_next"),
        ({"prompt": "something else"}, {}, "prompt"),
        ({"name": "set/0"}, {"dataset": "set"}, "already"),
    ],
)
def test_a_second_import_must_agree(tmp_path, changes, layout, named):
    write(tmp_path, [made_episode()])
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=named):
        write(tmp_path, [made_episode(**{"name": "new/0", **changes})], **{"dataset": "new", **layout})
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": np.array([[0.0, 0], [np.nan, 0]]), "actions": np.zeros((2, 3))}, "set/5, frame 1: state"),
        ({"actions": np.full((7, 3), np.inf)}, "set/5, frame 0: actions"),
        ({"actions": np.full((7, 3), 1e300)}, "set/5, frame 0: actions is not finite"),
        ({"actions": np.zeros((6, 3))}, "set/5: actions has 6 frames, state has 7"),
        ({"states": np.zeros((7,))}, "set/5: state has shape"),
        ({"states": np.zeros((0, 2))}, "set/5: state has shape"),
        ({"rewards": np.zeros(3)}, "set/5: rewards has 3 frames"),
        ({"human": np.zeros(7)}, "set/5: human is float64"),
        ({"human": np.ones(7, dtype=bool), "source": "auto"}, "import it as intervention"),
        ({"outcome": "won"}, "outcome is 'won'"),
        ({"source": "demos"}, "source is 'demos'"),
        ({"name": "5"}, "set/<index>"),
        ({"fps": 0.0}, "fps"),
        ({"fps": 11.0}, "fps is 11.0, earlier episodes have 10.0"),
        ({"read_frames": FlatFrames(("a.b",))}, "camera 'a.b'"),
        ({"read_frames": FlatFrames(())}, "no camera"),
        ({"read_frames": FlatFrames(("top", "wrist"))}, r"cameras are \['top', 'wrist'\]"),
    ],
)
def test_a_bad_episode_is_named_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        write(tmp_path, [made_episode(0), made_episode(**{"name": "set/5", **changes})])
    assert files_of(tmp_path) == {}


def test_unknown_outcomes_are_listed_together(tmp_path):
    episodes = [made_episode(i, source="auto", outcome="unknown" if i % 2 else "success") for i in range(5)]
    with pytest.raises(UsageError, match=r"2 auto .*set/1, set/3"):
        write(tmp_path, episodes)


def test_an_error_in_a_worker_leaves_the_old_data_untouched(tmp_path):
    write(tmp_path, [made_episode()])
    before = files_of(tmp_path)
    episodes = [made_episode(i, name=f"new/{i}", read_frames=BrokenFrames()) for i in range(3)]
    with pytest.raises(RuntimeError, match="camera file"):
        write(tmp_path, episodes, dataset="new", jobs=2)
    assert files_of(tmp_path) == before


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("renames_done", [0, 1, 2, 3, 4])
def test_an_import_cut_off_while_joining_is_taken_back_by_the_next(tmp_path, monkeypatch, renames_done):
    """The process dies at any rename: a copy of the folder at that moment is what the next import finds."""
    live, found = tmp_path / "live", tmp_path / "found"
    write(live, [made_episode()])
    before = files_of(live)
    real_replace, count = os.replace, 0

    def replace_until_the_cut(source, target):
        nonlocal count
        if os.fspath(target).startswith(str(live / "demo-000001")) or os.path.basename(target) == "manifest.json":
            count += 1
            if count > renames_done:
                shutil.copytree(live, found)
                raise PowerCut
        real_replace(source, target)

    second = [made_episode(name="new/0")]
    monkeypatch.setattr(os, "replace", replace_until_the_cut)
    if renames_done < 4:
        with pytest.raises(PowerCut):
            write(live, second, dataset="new")
        monkeypatch.undo()
        assert Manifest.load(found).num_samples == 7
        assert files_of(live) == before  # and where only an error was raised, it is taken back at once
        live = found
        write(live, second, dataset="new")
    else:
        write(live, second, dataset="new")
    assert Manifest.load(live).num_samples == 14
    assert verify_shards(live) == [] and not (live / ".writing").exists()


def test_tars_that_are_not_listed_are_never_touched(tmp_path):
    (tmp_path / "demo-000000.tar").write_bytes(b"someone's data")
    with pytest.raises(UsageError, match="is not in manifest"):
        write(tmp_path, [made_episode()])
    assert files_of(tmp_path) == {"demo-000000.tar": b"someone's data"}


def test_two_writers_do_not_meet(tmp_path):
    def episodes():
        yield made_episode(0)
        with pytest.raises(UsageError, match="another process"):
            write(tmp_path, [made_episode(1)])

    assert write(tmp_path, episodes()).num_episodes == 1


def test_keys_of_look_alike_names_stay_apart():
    keys = {writer.sample_key(f"{dataset}/1", 0) for dataset in ("a.b", "a_b", "a b", "x" * 60, "x" * 61)}
    assert len(keys) == 5
    assert writer.sample_key("reach/3", 17) == "reach-000003-00017"
    assert not any(letter in key for key in keys for letter in "./ ")


def test_progress_counts_up(tmp_path):
    calls = []
    write(tmp_path, [made_episode(i) for i in range(3)], progress=lambda *call: calls.append(call), samples_per_shard=7)
    assert calls[:3] == [("episodes", i, None) for i in (1, 2, 3)]
    assert calls[3:] == [("samples", 7 * i, 21) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [({"action_width": 2}, "under td_horizon"), ({"stride": 0}, "stride"), ({"samples_per_shard": 0}, "samples_per")],
)
def test_a_format_that_cannot_be_is_refused(tmp_path, layout, message):
    with pytest.raises(UsageError, match=message):
        write(tmp_path, [made_episode()], **layout)


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no episodes"):
        write(tmp_path, [])


def test_rewards_are_claimed_only_if_all_have_them(tmp_path):
    with_rewards = made_episode(0, rewards=np.zeros(7))
    assert write(tmp_path / "a", [with_rewards]).manifest.has_rewards
    without = replace(with_rewards, name="set/1", rewards=None)
    assert not write(tmp_path / "b", [with_rewards, without]).manifest.has_rewards
