"""The table of a large set: the same numbers from a file that processes share."""

import os
import pickle
import shutil
import tempfile

import numpy as np
import pytest

from recap_ds.data import array_file
from recap_ds.data.array_file import Layout, shared_arrays
from recap_ds.data.index import ShardIndex
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    """A node's own folder for temporary files."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def mapped(monkeypatch):
    monkeypatch.setattr(array_file, "MAX_SAMPLES_IN_MEMORY", 0)


def files(node) -> list[str]:
    return sorted(path.name for path in node.rglob("*.arrays"))


def assert_same(one: ShardSet, other: ShardSet) -> None:
    assert one.suffixes == other.suffixes and list(one.episodes) == list(other.episodes)
    np.testing.assert_array_equal(one.shard_starts, other.shard_starts)
    for mine, its in zip(one.table, other.table, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_a_mapped_table_is_that_of_memory_and_is_pickled_by_name(tmp_path, node, monkeypatch):
    plain = mixed_set(tmp_path / "shards")
    assert files(node) == []
    monkeypatch.setattr(array_file, "MAX_SAMPLES_IN_MEMORY", 0)
    mapped = ShardSet.open(tmp_path / "shards")
    assert_same(mapped, plain)
    copied = pickle.dumps(mapped.index)
    assert len(copied) < 500 < len(pickle.dumps(plain.index))
    assert_same(pickle.loads(pickle.dumps(mapped)), plain)
    assert not any(column.flags.writeable or column.flags.owndata for column in mapped.table)
    assert mapped.read_members(7) == plain.read_members(7)


def test_the_file_is_made_once_and_again_where_an_index_was_written_again(tmp_path, node, mapped):
    shards = write_tiny(tmp_path / "shards", [flat_episode(0, 12)])
    (first,) = files(node)
    path = next(node.rglob(first))
    inode = path.stat().st_ino
    assert_same(ShardSet.open(tmp_path / "shards"), shards)
    assert path.stat().st_ino == inode
    assert sorted(each.name for each in path.parent.iterdir()) == ["lock", first]
    index = ShardIndex.path_of(tmp_path / "shards" / "demo-000000.tar")
    ShardIndex.load(index).save(index)
    assert_same(ShardSet.open(tmp_path / "shards"), shards)
    assert len(files(node)) == 2
    index.unlink()
    with pytest.raises(UsageError, match=r"demo-000000\.index\.npz: cannot be read .*shards index"):
        ShardSet.open(tmp_path / "shards")


def test_a_file_nobody_used_for_a_week_goes_when_another_is_made(node):
    def make(name: str) -> array_file.ArrayFile:
        return shared_arrays(name, lambda: ({"x": Layout("<i8", (3,))}, lambda arrays: arrays["x"].fill(7)))

    used, unused = make("used"), make("unused")
    assert unused.arrays["x"].tolist() == [7, 7, 7]
    del unused
    for path in node.rglob("*.arrays"):
        os.utime(path, (0, 0))
    make("new")
    assert files(node) == ["new.arrays", "used.arrays"]
    used.path.unlink()  # somebody clears the folder: a worker that starts now still finds it
    assert pickle.loads(pickle.dumps(used)).arrays["x"].tolist() == [7, 7, 7]


def test_a_table_that_could_not_be_filled_is_not_there(tmp_path, node, mapped):
    write_tiny(tmp_path / "shards", [flat_episode(0, 12)])
    shutil.rmtree(node)
    node.mkdir()
    write_tiny(tmp_path / "other", [flat_episode(0, 12, task="cup")])
    shutil.copy(tmp_path / "other" / "demo-000000.index.npz", tmp_path / "shards")
    with pytest.raises(UsageError, match="task 'cup' is not in the manifest"):
        ShardSet.open(tmp_path / "shards")
    assert len(files(node)) == 1, "that of the other set"
    assert not list(node.rglob("*.tmp"))


def test_what_cannot_be_used_is_one_line(node):
    def plan():
        return {"x": Layout("<i8", (2**45,))}, lambda arrays: None

    with pytest.raises(UsageError, match=r"large\.arrays: cannot be written \(.*\); set TMPDIR"):
        shared_arrays("large", plan)
    (folder,) = node.iterdir()
    assert not list(folder.glob("*.arrays")) and not list(folder.glob("*.tmp"))
    (folder / "broken.arrays").write_bytes(b"{")
    with pytest.raises(UsageError, match=r"broken\.arrays: damaged .*remove it"):
        shared_arrays("broken", plan)
    folder.chmod(0o777)
    with pytest.raises(UsageError, match=r"is not a folder that only this user may write to"):
        shared_arrays("x", plan)
