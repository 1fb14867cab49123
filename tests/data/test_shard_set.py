import os
import pickle

import numpy as np
import pytest

from recap_ds.batch import SOURCE_IDS
from recap_ds.data import shard_files
from recap_ds.data.index import ShardIndex, read_samples
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.errors import UsageError
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny


def test_every_row_and_every_member_is_what_the_tar_holds(tmp_path):
    shard_set = mixed_set(tmp_path)
    table, tasks = shard_set.table, list(shard_set.manifest.tasks)
    sample = 0
    for entry in shard_set.manifest.shards:
        for _, record, members, _ in read_samples(tmp_path / entry.name):
            assert shard_set.read_members(sample) == members
            assert shard_set.episodes[table.episode[sample]] == record.episode
            assert tasks[table.task[sample]] == record.task
            assert table.source[sample] == SOURCE_IDS[record.source]
            for name in ("frame", "episode_length", "num_valid", "next_offset"):
                assert getattr(table, name)[sample] == getattr(record, name), name
            sample += 1
    assert sample == shard_set.num_samples == len(table.start) > 100
    assert len(shard_set.manifest.shards) > 6


def test_few_files_stay_open_and_a_copy_opens_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 2)
    shard_set = mixed_set(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    samples = list(range(0, shard_set.num_samples, 5))
    members = [shard_set.read_members(sample) for sample in samples]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    copy = pickle.loads(pickle.dumps(shard_set))
    assert [copy.read_members(sample) for sample in samples] == members
    shard_set.close()
    copy.close()
    assert len(os.listdir("/proc/self/fd")) == before


def damage(path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_one_flipped_bit_damages_one_sample(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 12)])
    path = tmp_path / shard_set.manifest.shards[0].name
    index = ShardIndex.load(ShardIndex.path_of(path))
    damage(path, int(index.offsets[5, list(index.suffixes).index("left.jpg")]) + 100)
    with pytest.raises(DamagedSample, match="crc32") as caught:
        shard_set.read_members(5)
    assert (caught.value.shard, caught.value.key) == (path.name, index.keys[5])
    assert pickle.loads(pickle.dumps(caught.value)).key == index.keys[5]
    for sample in (4, 6):
        shard_set.read_members(sample)


def test_short_and_missing_shards_are_damage_once_opened(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 12)])
    path = tmp_path / shard_set.manifest.shards[0].name
    os.truncate(path, int(shard_set.table.start[7]) + 10)
    shard_set.read_members(6)
    with pytest.raises(DamagedSample, match=r"10 of .* bytes are there"):
        shard_set.read_members(7)
    with pytest.raises(DamagedSample, match=r"^\S+: sample .*: 0 of .*cut short"):
        shard_set.read_members(11)
    shard_set.close()
    path.unlink()
    with pytest.raises(DamagedSample, match="cannot be read"):
        shard_set.read_members(0)


def test_what_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"manifest\.json: missing"):
        ShardSet.open(tmp_path / "nowhere")
    entry = write_tiny(tmp_path, [flat_episode(0, 12)]).manifest.shards[0]
    tar = tmp_path / entry.name
    tar.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{entry.name}: missing, though the manifest lists it"):
        ShardSet.open(tmp_path)
    (tmp_path / "elsewhere").rename(tar)
    index = ShardIndex.path_of(tar)
    index.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{index.name}: missing"):
        ShardSet.open(tmp_path)


def test_an_index_of_another_shard_is_refused(tmp_path):
    write_tiny(tmp_path / "a", [flat_episode(0, 12)])
    write_tiny(tmp_path / "b", [flat_episode(0, 11)])
    index = ShardIndex.path_of(tmp_path / "a" / "demo-000000.tar")
    index.write_bytes(ShardIndex.path_of(tmp_path / "b" / "demo-000000.tar").read_bytes())
    with pytest.raises(UsageError, match="11 samples, the manifest says 12"):
        ShardSet.open(tmp_path / "a")


def held_out_names(shard_set: ShardSet, fraction: float) -> set[str]:
    mask = shard_set.held_out(fraction)
    return {shard_set.episodes[episode] for episode in np.unique(shard_set.table.episode[mask])}


def identities(shard_set: ShardSet) -> dict[tuple[str, int], int]:
    table = shard_set.table
    return {
        (shard_set.episodes[table.episode[i]], int(table.frame[i])): shard_set.identity(i)
        for i in range(shard_set.num_samples)
    }


def test_held_out_episodes_are_whole_and_near_the_fraction(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(i, 3) for i in range(200)], samples_per_shard=64)
    mask, episode = shard_set.held_out(0.3), shard_set.table.episode
    for number in range(200):
        assert len(set(mask[episode == number])) == 1
    # Within 3 standard deviations of a binomial.
    assert abs(len(held_out_names(shard_set, 0.3)) - 60) < 3 * np.sqrt(200 * 0.3 * 0.7)
    assert not shard_set.held_out(0.0).any()
    assert held_out_names(shard_set, 0.1) <= held_out_names(shard_set, 0.3)


def test_held_out_episodes_stay_when_data_is_added(tmp_path):
    first = write_tiny(tmp_path, [flat_episode(i, 3) for i in range(30)])
    before = held_out_names(first, 0.3)
    more = write_tiny(tmp_path, [flat_episode(i, 4, source="auto", task="cup") for i in range(30)])
    assert {name for name in held_out_names(more, 0.3) if name.startswith("demo/")} == before
    assert identities(first).items() <= identities(more).items()
    assert len(set(identities(more).values())) == more.num_samples
