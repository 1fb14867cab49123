import numpy as np
import pytest

from recap_ds.data.divide import split_shards
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest
from recap_ds.data.merge import merge_shards
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from tests.data.made_episodes import FlatFrames, made_episode, read_back, write

HUMAN = np.array([0, 0, 1, 1, 0, 0, 0], dtype=bool)


@pytest.fixture
def folder(tmp_path):
    """Two data sets, two tasks, three sources and outcomes; the second lacks a camera and has rewards."""
    place = tmp_path / "all"
    cameras = FlatFrames(("top", "wrist"))
    first = [made_episode(i, read_frames=cameras) for i in range(4)]
    first += [made_episode(4, task="stack up", read_frames=cameras, source="intervention", human=HUMAN)]
    write(place, first, samples_per_shard=20)
    changes = {"source": "auto", "rewards": np.zeros(7)}
    second = [made_episode(i, name=f"new.b/{i}", outcome=("success", "failure")[i], **changes) for i in range(2)]
    write(place, second, dataset="new.b", absent_cameras=("wrist",))
    return place


def samples_of(place):
    return {(sample.record.episode, sample.record.frame): sample for sample in read_back(place)}


def keys_of(place, shards):
    return [key for name in shards for key in ShardIndex.load(ShardIndex.path_of(place / name)).keys.tolist()]


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("source", {"demo": 28, "auto": 19, "intervention": 2}),
        ("dataset", {"set": 35, "new.b": 14}),
        ("task", {"sort": 42, "stack up": 7}),
        ("outcome", {"success": 42, "failure": 7}),
    ],
)
def test_every_sample_goes_to_its_part_and_they_merge_again(tmp_path, folder, by, parts):
    found = split_shards(folder, tmp_path / "out", by)
    assert {name: manifest.num_samples for name, (_, manifest) in found.items()} == parts
    before, after = samples_of(folder), {}
    for place, manifest in found.values():
        assert Manifest.load(place) == manifest and verify_shards(place) == []
        after |= samples_of(place)
    assert {key: (one.key, one.members) for key, one in after.items()} == {
        key: (one.key, one.members) for key, one in before.items()
    }
    if by == "dataset":
        place, manifest = found["new.b"]
        assert place.name.startswith("new_b_") and manifest.has_rewards
    merged = merge_shards([place for place, _ in found.values()], tmp_path / "merged")
    old = Manifest.load(folder)
    assert (merged.counts, merged.tasks.keys()) == (old.counts, old.tasks.keys())
    for source, features in old.statistics.items():
        for feature, stats in features.items():
            again = merged.statistics[source][feature]
            assert (again.count, again.histograms) == (stats.count, stats.histograms)
            np.testing.assert_allclose([again.mean, again.std], [stats.mean, stats.std], rtol=1e-9, atol=1e-12)


def test_the_held_out_part_is_trainings(tmp_path, folder):
    shard_set = ShardSet.open(folder)
    episodes = {shard_set.episodes[i] for i in shard_set.table.episode[shard_set.held_out(0.3)]}
    (training, _), (held_out, _) = split_shards(folder, tmp_path / "out", "held-out", 0.3).values()
    assert {episode for episode, _ in samples_of(held_out)} == episodes
    assert {episode for episode, _ in samples_of(training)} == set(shard_set.episodes) - episodes


def test_shards_stay_even_and_in_order(tmp_path, folder):
    (place, manifest), *_ = split_shards(folder, tmp_path / "out", "source").values()
    assert [shard.num_samples for shard in manifest.shards] == [14, 14]
    demos = [shard.name for shard in Manifest.load(folder).shards if shard.source == "demo"]
    assert keys_of(place, [shard.name for shard in manifest.shards]) == keys_of(folder, demos)


def test_a_part_is_a_new_folder_and_damage_is_named(tmp_path, folder):
    split_shards(folder, tmp_path / "out", "outcome")
    with pytest.raises(UsageError, match="success: holds shards already"):
        split_shards(folder, tmp_path / "out", "outcome")
    shard = folder / "demo-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match=r"demo-000000\.tar: sample .*shards verify"):
        split_shards(folder, tmp_path / "again", "source")
    assert not list((tmp_path / "again").rglob("*.tar"))
