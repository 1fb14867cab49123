import dataclasses
import json
import os
from collections import Counter

import numpy as np
import pytest

from recap_ds.data import fetch, stream
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.stream import StreamDataset
from recap_ds.errors import RunFailed, UsageError
from tests.data.shard_server import serve
from tests.data.test_loader import assert_equal, dataset_of, load
from tests.data.tiny_shards import flat_episode, mixed_set, tiny_config, write_tiny


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("shards"))


def config_of(**data):
    return tiny_config(data={"streaming": True, "stream_pool_samples": 8, **data})


def streams_of(shard_set, config, rank=0, world=1, damage_log=None) -> StreamDataset:
    assembler = dataset_of(shard_set, config).assembler
    return StreamDataset(assembler, config, 8, rank, world, damage_log)


def drawn(dataset: StreamDataset, num_slots: int, monkeypatch) -> list[int]:
    """Ids of the samples that fill the first slots."""
    seen, stack = [], dataset.assembler.stack
    monkeypatch.setattr(
        dataset.assembler, "stack", lambda samples, *rest: seen.extend(samples) or stack(samples, *rest)
    )
    dataset.batch(np.arange(num_slots))
    return [int(sample) for sample in seen]


def test_slots_have_the_parts_of_exact_training_and_samples_that_may_be_trained_on(shards, monkeypatch):
    config = config_of(held_out_fraction=0.3, mixture={"demo": 1, "auto": 3})
    dataset, exact = streams_of(shards, config), dataset_of(shards, config)
    batch, wanted = dataset.starting_at(0).batch(np.arange(64)), exact.batch(np.arange(64))
    assert (batch.source == wanted.source).all() and (batch.noise == wanted.noise).all() and not batch.replaced.any()
    assert dataset.names(np.array([3]), "loss spike") == [
        "slot 3: a streamed sample, whose name is not known: loss spike"
    ]
    samples = drawn(dataset.starting_at(0), 64, monkeypatch)
    assert not shards.held_out(0.3)[samples].any()
    assert samples != exact.order.samples(np.arange(64))[1].tolist()
    # What a streamed sample becomes is what it becomes when it is read by itself.
    for row in (0, 1, 63):
        np.testing.assert_array_equal(batch.actions[row], exact.assembler.read(samples[row]).actions)
        np.testing.assert_array_equal(batch.observation.images[row], exact.assembler.read(samples[row]).view.images)


def test_every_sample_comes_equally_often_and_not_in_the_order_of_the_shards(shards, monkeypatch):
    config = config_of(mixture={"demo": 1})
    demos = np.flatnonzero(shards.table.source == 0)
    samples = drawn(streams_of(shards, config).starting_at(0), 5 * len(demos), monkeypatch)
    times = Counter(samples)
    assert set(times) == set(demos.tolist()) and set(times.values()) <= {4, 5, 6}
    assert samples[:20] != sorted(samples[:20])


def test_readers_share_the_shards_of_an_epoch(shards, monkeypatch):
    config = config_of(mixture={"demo": 1}, stream_pool_samples=1)
    demos = np.flatnonzero(shards.table.source == 0)
    num_shards = len({shards.shard_of(sample) for sample in demos})
    assert num_shards % 2 == 0
    both = [
        drawn(streams_of(shards, config, rank, 2).starting_at(0), 3 * len(demos) // 8, monkeypatch) for rank in (0, 1)
    ]
    assert not set(both[0]) & set(both[1])


def test_streams_begin_anew_where_a_run_goes_on(shards):
    config = config_of()
    dataset = streams_of(shards, config)
    first = load(dataset, config)
    assert_equal(first, load(dataset, config))
    later = load(dataset, config, start_slot=24)
    assert all((a.actions != b.actions).any() for a, b in zip(first, later, strict=True))


def test_a_worker_reads_what_its_rank_would(shards):
    alone, config = config_of(), config_of(num_workers=1)
    assert_equal(load(streams_of(shards, alone), alone), load(streams_of(shards, config), config))


def test_remote_streams_are_the_local_ones_and_keep_nothing(shards, tmp_path):
    config = config_of(cache_folder=str(tmp_path / "cache"), fetch_patience_seconds=5)
    local = load(streams_of(shards, config), config, num_steps=12)
    with serve(shards.folder) as server:
        server.drop_every, server.truncate = 3, {entry.name for entry in shards.manifest.shards}
        remote = ShardSet.open(server.url, config.data)
        assert_equal(local, load(streams_of(remote, config), config, num_steps=12))
        assert not list((tmp_path / "cache" / "shards").glob("*.tar"))
        server.drop_every = 1
        hasty = dataclasses.replace(remote.remote.cache, patience_seconds=0.01)
        remote.remote = dataclasses.replace(remote.remote, cache=hasty)
        with pytest.raises(RunFailed, match=r"\.tar could not be fetched, .* within 0\.01 s") as caught:
            load(streams_of(remote, config), config)
        assert "\n" not in str(caught.value) and " @ " not in str(caught.value)


def test_damage_is_left_out_flagged_and_logged(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(i, 10) for i in range(8)], samples_per_shard=10)
    names = [entry.name for entry in shard_set.manifest.shards]
    sound = {sample: shard_set.read_members(sample) for sample in range(shard_set.num_samples)}
    with open(tmp_path / names[1], "r+b") as file:  # one sample
        file.seek(int(shard_set.table.start[13]) + 3)
        file.write(b"damage")
    os.truncate(tmp_path / names[2], int(shard_set.table.start[25]) + 10)  # five of them
    with open(tmp_path / names[3], "r+b") as file:  # tarfile takes it for the end
        file.seek(int(shard_set.table.start[34]) - 512)
        file.write(b"\xff" * 512)
    (tmp_path / names[4]).unlink()
    config, log = config_of(max_damaged_fraction=1), tmp_path / "damaged.jsonl"
    dataset = streams_of(ShardSet.open(tmp_path, config.data), config, damage_log=log).starting_at(0)
    given, decode = [], dataset.assembler.decode

    def check(sample, members):
        assert members == sound[sample]
        given.append(sample)
        return decode(sample, members)

    dataset.assembler.decode = check
    batch = dataset.batch(np.arange(160))
    # Of a shard that breaks off, the sample before it too: nobody knew yet that it was whole.
    lost = {13, *range(24, 30), *range(34, 50)}
    assert set(given) == set(range(80)) - lost
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["shard"], line["key"]) for line in lines} == {
        (damage.shard, damage.key) for damage in (shard_set.damaged(sample, "") for sample in lost)
    }
    assert batch.replaced.sum() == len({line["slot"] for line in lines})


def test_a_set_without_a_sound_sample_is_one_line(tmp_path, monkeypatch):
    shard_set = write_tiny(tmp_path, [flat_episode(i, 10) for i in range(3)], samples_per_shard=10)
    config = config_of(max_damaged_fraction=1)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"pick the cube", b"pick the cup!"))
    with pytest.raises(UsageError, match=r"no sound 'demo' sample in 4 shards; see 'recap-ds shards verify"):
        load(streams_of(shard_set, config), config)
    monkeypatch.setattr(stream, "MAX_DAMAGED", 20)
    with pytest.raises(UsageError, match=r"20 damaged samples in a row \(last: .* crc32"):
        load(streams_of(shard_set, config), config)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match="no sound 'demo' sample"):
        load(streams_of(shard_set, config), config)


def test_streams_have_no_lanes(shards):
    with pytest.raises(UsageError, match=r"data\.lanes: streams are not read in lanes"):
        streams_of(shards, config_of(lanes=2))
