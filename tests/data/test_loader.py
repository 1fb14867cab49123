import json
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_ds.batch import SOURCE_IDS, TransitionBatch, map_tensors
from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.data import array_file
from recap_ds.data.assemble import Assembler
from recap_ds.data.index import ShardIndex
from recap_ds.data.loader import MAX_ATTEMPTS, TransitionDataset, build_train_loader
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import ByteTokenizer
from tests.data.tiny_shards import flat_episode, mixed_set, scale_of, tiny_config, write_tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("shards"))


def dataset_of(shard_set: ShardSet, config: PiStarRECAPConfig, damage_log: Path | None = None) -> TransitionDataset:
    manifest = shard_set.manifest
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), config)
    assembler = Assembler(shard_set, config, ByteTokenizer(), normalizer, scale_of(config, manifest))
    return TransitionDataset(assembler, config, slots_per_step=8, damage_log=damage_log)


def load(dataset, config, sizes=(8, 1, 1), rank=0, start_slot=0, num_steps=3) -> list[TransitionBatch]:
    micro, accumulation, world = sizes
    sizes = BatchSizes(micro=micro, accumulation=accumulation, world=world)
    return list(
        build_train_loader(dataset, config, sizes, rank, start_slot=start_slot, num_steps=num_steps, pin_memory=False)
    )


def leaves(batch: TransitionBatch) -> list[torch.Tensor]:
    found = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, batch)
    return found


def assert_equal(one: list[TransitionBatch], other: list[TransitionBatch]) -> None:
    """Whatever the sizes of the batches: their rows, one after another, are the same."""
    for a, b in zip(zip(*map(leaves, one), strict=True), zip(*map(leaves, other), strict=True), strict=True):
        assert torch.equal(torch.cat(a), torch.cat(b))


def test_global_batches_do_not_depend_on_world_size_or_accumulation(shards):
    config = tiny_config()
    dataset = dataset_of(shards, config)
    whole = load(dataset, config, (8, 1, 1))
    assert len(whole) == 3 and torch.equal(torch.cat([batch.slot for batch in whole]), torch.arange(24))
    for micro, accumulation, world in ((4, 1, 2), (4, 2, 1), (2, 2, 2)):
        ranks = [load(dataset, config, (micro, accumulation, world), rank) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {3 * accumulation}
        in_order = [
            batch
            for step in range(3)
            for batches in ranks
            for batch in batches[step * accumulation : (step + 1) * accumulation]
        ]
        assert_equal(whole, in_order)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # three, also on two cores
def test_workers_change_nothing_but_the_waiting(shards, monkeypatch, tmp_path):
    config = tiny_config()
    alone = load(dataset_of(shards, config), config)
    three = tiny_config(data={"num_workers": 3})
    # As with a large set, whose table they map.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(array_file, "MAX_SAMPLES_IN_MEMORY", 0)
    dataset = dataset_of(ShardSet.open(shards.folder), three)
    assert len(list(tmp_path.rglob("*.arrays"))) == 1
    in_memory, table = dataset_of(shards, three), sum(column.nbytes for column in shards.table)
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(in_memory)) - table
    assert_equal(alone, load(dataset, three))


def test_a_start_in_the_middle_equals_the_rest_of_the_whole(shards):
    config = tiny_config()
    whole = load(dataset_of(shards, config), config, num_steps=6)
    assert_equal(whole[4:], load(dataset_of(shards, config), config, start_slot=32, num_steps=2))
    # A skipped step moves the slot only: any slot will do, not only whole steps.
    assert load(dataset_of(shards, config), config, start_slot=5, num_steps=1)[0].slot[0] == 5


def test_an_epoch_of_each_source_visits_every_sample_once(shards):
    # Drawn from one source alone, every run of its size in slots is an epoch.
    config = tiny_config(data={"mixture": {"intervention": 1}})
    dataset = dataset_of(shards, config)
    size = int((shards.table.source == SOURCE_IDS["intervention"]).sum())
    _, ids = dataset.order.samples(np.arange(2 * size))
    for epoch in ids.reshape(2, size):
        np.testing.assert_array_equal(np.sort(epoch), np.flatnonzero(shards.table.source == SOURCE_IDS["intervention"]))


def test_held_out_samples_are_never_drawn(shards):
    dataset = dataset_of(shards, tiny_config(data={"held_out_fraction": 0.3}))
    held_out = shards.held_out(0.3)
    assert held_out.any()
    assert not held_out[dataset.order.samples(np.arange(4096))[1]].any()


def test_shapes_kinds_and_draws(shards):
    config = tiny_config(model={"flow_samples": 3}, recap={"indicator_dropout": 0.5})
    batch = dataset_of(shards, config).batch(np.arange(64))
    assert batch.noise.shape == (64, 3, 4, 3) and batch.time.shape == (64, 3)
    assert batch.observation.images.shape == (64, 2, 3, 16, 16)
    assert ((batch.time > 0) & (batch.time <= 1)).all()
    # Beta(1.5, 1) has mean 0.6 and standard deviation 0.2619: 192 draws.
    assert abs(batch.time.mean() - 0.6) < 4 * 0.2619 / 192**0.5
    assert 16 <= batch.indicator_dropped.sum() <= 48
    assert not batch.replaced.any() and batch.sample_valid.all()
    for name, dtype in (("slot", torch.int64), ("noise", torch.float32), ("indicator_dropped", torch.bool)):
        assert getattr(batch, name).dtype == dtype
    assert all(leaf.is_contiguous() for leaf in leaves(batch))


def test_the_seed_moves_order_and_draws(shards):
    here, there = (dataset_of(shards, tiny_config(training={"seed": seed})).batch(np.arange(32)) for seed in (0, 1))
    assert not torch.equal(here.actions, there.actions)
    assert not torch.equal(here.noise, there.noise)


def test_data_sets_are_picklable_and_small_without_files(shards):
    dataset = dataset_of(shards, tiny_config())
    before = dataset.batch(np.arange(8))  # opens files and fills caches
    again = pickle.loads(pickle.dumps(dataset))
    assert_equal([before], [again.batch(np.arange(8))])


def damage(shard_set: ShardSet, samples: np.ndarray) -> None:
    for sample in samples:
        path = shard_set.folder / shard_set.manifest.shards[shard_set.shard_of(sample)].name
        with open(path, "r+b") as file:
            file.seek(int(shard_set.table.start[sample] + shard_set.table.offsets[sample].max()) + 20)
            file.write(b"damage")


def test_damaged_samples_are_replaced_flagged_and_logged(tmp_path):
    shard_set = mixed_set(tmp_path)
    bad = np.arange(0, shard_set.num_samples, 7)
    damage(shard_set, bad)
    config, log = tiny_config(), tmp_path / "damaged.jsonl"
    dataset = dataset_of(shard_set, config, log)
    slots = np.arange(64)
    batch = dataset.batch(slots)
    parts, samples = dataset.order.samples(slots)
    np.testing.assert_array_equal(batch.replaced.numpy(), np.isin(samples, bad))
    # The sources stay as drawn: a replacement comes from the same one.
    sources = [SOURCE_IDS[dataset.order.parts[part].source] for part in parts]
    np.testing.assert_array_equal(batch.source.numpy(), sources)
    # The draws are the slot's own, whoever fills it; and all of it happens again the same way.
    assert_equal([batch], load(dataset_of(shard_set, config), config, num_steps=8))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    first = next(slot for slot in slots if samples[slot] in bad)
    path = shard_set.folder / shard_set.manifest.shards[shard_set.shard_of(samples[first])].name
    row = samples[first] - shard_set.shard_starts[shard_set.shard_of(samples[first])]
    assert lines[0]["slot"] == first and lines[0]["shard"] == path.name
    assert lines[0]["key"] == ShardIndex.load(ShardIndex.path_of(path)).keys[row]
    assert "crc32" in lines[0]["what"]
    assert len(lines) >= batch.replaced.sum()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_damage_ends_in_one_line(tmp_path, num_workers):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 10)])
    damage(shard_set, np.arange(10))
    config = tiny_config(data={"num_workers": num_workers})
    with pytest.raises(UsageError, match=f"no sound sample was found for slot 0 in {MAX_ATTEMPTS + 1} tries") as caught:
        load(dataset_of(shard_set, config), config)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_sample_table_costs_about_a_hundred_bytes_a_sample(shards):
    assert sum(column.nbytes for column in shards.table) / shards.num_samples < 150


def test_loaders_leave_no_files_open(shards):
    config = tiny_config(data={"num_workers": 1})
    load(dataset_of(shards, config), config)
    before = len(os.listdir("/proc/self/fd"))
    load(dataset_of(shards, config), config)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
