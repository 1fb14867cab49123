import json

import numpy as np
import pytest

from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest
from recap_ds.data.rebuild import rebuild
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from tests.data.made_episodes import made_episode, read_back, write
from tests.data.test_index import json_bytes, write_tar


def written(folder, **changes) -> Manifest:
    human = np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)
    episodes = [made_episode(0), made_episode(1, source="intervention", human=human, outcome="truncated")]
    return write(folder, episodes, samples_per_shard=6, **changes).manifest


@pytest.mark.parametrize(("changes", "jobs"), [({}, 1), ({}, 2), ({"store_next": False}, 1), ({"stride": 3}, 1)])
def test_lost_indices_and_manifest_come_back(tmp_path, changes, jobs):
    before = written(tmp_path, **changes)
    indices = {path.name: path.read_bytes() for path in tmp_path.glob("*.index.npz")}
    for name in (*indices, "manifest.json"):
        (tmp_path / name).unlink()
    after = rebuild(tmp_path, jobs=jobs)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.index.npz")} == indices
    assert verify_shards(tmp_path) == []
    old, new = before.model_dump(exclude={"statistics"}), after.model_dump(exclude={"statistics"})
    assert old == new
    for source, features in before.statistics.items():
        for name, stats in features.items():
            again = after.statistics[source][name]
            np.testing.assert_allclose(again.mean, stats.mean)
            np.testing.assert_allclose(again.std, stats.std)
            assert again.histograms == stats.histograms and again.count == stats.count


def test_what_tars_cannot_say_comes_from_the_manifest(tmp_path):
    write(tmp_path, [made_episode(num_frames=2, task="b")], td_horizon=4)
    write(tmp_path, [made_episode(name="new/0", num_frames=2, task="a")], td_horizon=4, dataset="new")
    (tmp_path / "demo-000001.index.npz").write_bytes(b"damaged")
    after = rebuild(tmp_path)
    assert after.td_horizon == 4 and list(after.tasks) == ["b", "a"]
    (tmp_path / "manifest.json").unlink()
    after = rebuild(tmp_path)
    assert after.td_horizon == 2 and list(after.tasks) == ["a", "b"]


def test_shards_removed_by_hand_leave_the_manifest(tmp_path):
    before = written(tmp_path)
    gone = before.shards[-1].name
    (tmp_path / gone).unlink()
    after = rebuild(tmp_path)
    assert [shard.name for shard in after.shards] == [shard.name for shard in before.shards[:-1]]


def test_tars_made_elsewhere_are_taken(tmp_path):
    written(tmp_path / "ours")
    members = []
    for sample in reversed(read_back(tmp_path / "ours")):
        if sample.record.source == "demo":
            extra = json.dumps({**sample.record.model_dump(), "gripper": "left"}).encode()
            members += [(f"{sample.key}.{name}", data) for name, data in {**sample.members, "json": extra}.items()]
    (tmp_path / "theirs").mkdir()
    write_tar(tmp_path / "theirs" / "demo-000007.tar", members)
    manifest = rebuild(tmp_path / "theirs")
    assert manifest.counts["demo"].samples == 7 and manifest.cameras == ("top",)
    assert ShardIndex.load(tmp_path / "theirs" / "demo-000007.index.npz").num_samples == 7
    assert verify_shards(tmp_path / "theirs") == []


@pytest.mark.parametrize(
    ("name", "members", "message"),
    [
        ("data.tar", [("a.json", json_bytes())], "rename it"),
        ("auto-000000.tar", [("a.json", json_bytes())], "no a.state.npy"),
        ("auto-000000.tar", [("a.json", json_bytes()), ("a.state.npy", b"x")], "a.state.npy"),
        ("auto-000000.tar", [], "no samples"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(tmp_path, name, members, message):
    write_tar(tmp_path / name, members)
    with pytest.raises(UsageError, match=message):
        rebuild(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_shards_of_another_source_or_dims_are_refused(tmp_path):
    write(tmp_path / "a", [made_episode()])
    write(tmp_path / "b", [made_episode(1)], action_width=6)
    (tmp_path / "b" / "demo-000000.tar").rename(tmp_path / "a" / "demo-000001.tar")
    with pytest.raises(UsageError, match=r"action_width is 6 in demo-000001.tar but 4 in demo-000000.tar"):
        rebuild(tmp_path / "a")
    (tmp_path / "a" / "demo-000001.tar").unlink()
    (tmp_path / "a" / "demo-000000.tar").rename(tmp_path / "a" / "auto-000000.tar")
    with pytest.raises(UsageError, match="differs from the shard's name"):
        rebuild(tmp_path / "a")


def test_an_empty_or_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="holds no"):
        rebuild(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        rebuild(tmp_path / "missing")
