import pytest

from recap_ds.data.manifest import Manifest
from recap_ds.data.merge import merge_shards
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from tests.data.made_episodes import FlatFrames, made_episode, write

JOB = {"files": "a checksum"}


def two_folders(tmp_path):
    """And one that holds the same, imported together."""
    first = [made_episode(i, task="b") for i in range(3)]
    second = [made_episode(i, 5, name=f"new/{i}", task="a", source="auto" if i else "demo") for i in range(2)]
    write(tmp_path / "one", first, samples_per_shard=7, job=JOB)
    write(tmp_path / "two", second, dataset="new", job=JOB)
    write(tmp_path / "both", first, samples_per_shard=7)
    write(tmp_path / "both", second, dataset="new")
    return [tmp_path / "one", tmp_path / "two"], tmp_path / "both"


def test_merged_folders_are_what_one_folder_would_have_been(tmp_path):
    folders, both = two_folders(tmp_path)
    merged = merge_shards(folders, tmp_path / "out")
    assert merged == Manifest.load(tmp_path / "out") == Manifest.load(both)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == {
        path.name: path.read_bytes() for path in both.glob("*.tar")
    }
    assert verify_shards(tmp_path / "out") == []


def test_a_folder_joins_one_that_is_there(tmp_path):
    (one, two), both = two_folders(tmp_path)
    merge_shards([two], one)
    assert Manifest.load(one) == Manifest.load(both)
    # Imports are known under the new names of their shards.
    assert write(one, [], dataset="new", job=JOB).was_there and write(one, [], samples_per_shard=7, job=JOB).was_there
    before = (one / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match=r"episode new/0 is in .*one as well; a data set is merged once"):
        merge_shards([two], one)
    assert (one / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 20.0}, r"one: fps is 10\.0 there but 20\.0 in .*two; merge folders of one form"),
        ({"read_frames": FlatFrames(("wrist",))}, "cameras is"),
    ],
)
def test_folders_of_another_form_are_refused(tmp_path, changes, message):
    write(tmp_path / "one", [made_episode()])
    write(tmp_path / "two", [made_episode(name="new/0", **changes)], dataset="new")
    with pytest.raises(UsageError, match=message):
        merge_shards([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-*"))


def test_what_cannot_be_merged_is_named(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, [made_episode()])
    write(two, [made_episode(name="new/0", prompt="another")], dataset="new")
    with pytest.raises(UsageError, match="task 'sort' has another prompt than in"):
        merge_shards([one, two], tmp_path / "out")
    for folders, out in (([one, one], tmp_path / "out"), ([one], one)):
        with pytest.raises(UsageError, match="one: is named twice"):
            merge_shards(folders, out)
    shard = one / "demo-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match=r"demo-000000\.tar: is not what its manifest lists"):
        merge_shards([one], tmp_path / "out")
    shard.unlink()
    with pytest.raises(UsageError, match=r"demo-000000\.tar: missing"):
        merge_shards([one], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-*"))
