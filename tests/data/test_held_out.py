import json

import numpy as np
import pytest
import torch

from recap_ds.data.held_out import EvaluationBatches, choose_samples
from recap_ds.data.shard_set import ShardSet
from tests.data.test_assemble import assembler_of
from tests.data.test_loader import damage
from tests.data.tiny_shards import flat_episode, mixed_set, tiny_config, write_tiny

FRACTION = 0.4


def config_of(max_samples: int = 20, batch_size: int = 3, num_flow_times: int = 4):
    evaluation = {"max_samples": max_samples, "batch_size": batch_size, "num_flow_times": num_flow_times}
    return tiny_config(data={"held_out_fraction": FRACTION}, evaluation=evaluation)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("shards"))


def batches_of(shard_set, config, rank=0, world=1, **options) -> EvaluationBatches:
    return EvaluationBatches(assembler_of(shard_set, config), config, rank=rank, world=world, **options)


def test_choice_is_held_out_and_spread_over_sources_and_tasks(shards):
    chosen = choose_samples(shards, FRACTION, 24)
    assert len(set(chosen)) == 24 and shards.held_out(FRACTION)[chosen].all()
    held_out = np.flatnonzero(shards.held_out(FRACTION))

    def groups(ids):
        return dict(
            zip(*np.unique(shards.table.source[ids] * 10 + shards.table.task[ids], return_counts=True), strict=True)
        )

    available, given = groups(held_out), groups(chosen)
    assert given.keys() == available.keys() and len(given) > 2
    full = [given[group] for group in given if given[group] < available[group]]
    assert max(full) - min(full) <= 1
    assert all(given[group] <= available[group] for group in given)


def test_a_small_group_gives_all_it_has_and_the_others_share_the_rest(tmp_path):
    episodes = [flat_episode(i, 12) for i in range(12)] + [flat_episode(i, 2, source="auto") for i in range(3)]
    shard_set = write_tiny(tmp_path, episodes)
    sources = shard_set.table.source[choose_samples(shard_set, 0.9999, 40)]
    np.testing.assert_array_equal(np.bincount(sources), [34, 6])


def test_asking_for_more_than_there_is_gives_all(shards):
    np.testing.assert_array_equal(choose_samples(shards, FRACTION, 10**6), np.flatnonzero(shards.held_out(FRACTION)))


def test_every_rank_has_the_same_number_of_batches_and_each_sample_is_seen_once(shards):
    config = config_of(max_samples=20, batch_size=3)
    num_batches = len(batches_of(shards, config))
    assert num_batches >= 7
    for world in (1, 2, 3, 4):
        ranks = [list(batches_of(shards, config, rank, world)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {-(-num_batches // world)}
        rows = [batch for batches in ranks for batch in batches]
        assert sum(int(batch.sample_valid.sum()) for batch in rows) == 20
        assert all(len(batch.slot) == 3 + 1 for batch in rows)
        # Noise is keyed by the sample, so its rows name the samples.
        noise = torch.cat([batch.noise[batch.sample_valid, 0, 0, 0] for batch in rows])
        assert len(noise.unique()) == 20
        if world == 1:
            reference = noise.sort().values
        assert torch.equal(noise.sort().values, reference)


def test_padded_rows_are_masked_everywhere(shards):
    last = list(batches_of(shards, config_of(max_samples=20, batch_size=16)))[-1]
    valid, rows = last.sample_valid, torch.arange(17)
    there = valid.clone()
    there[last.image_lender[valid]] = True
    assert there.sum() == valid.sum() + 1, "one only lends its images"
    for mask in (last.td_valid, last.mc_valid, last.action_valid.any(dim=1), last.td_action_valid.any(dim=1)):
        assert not mask[~valid].any()
    assert not last.observation.images[~there].any() and last.observation.images[there].flatten(1).any(dim=1).all()
    assert torch.equal(last.image_lender[~there], rows[~there])
    assert last.observation.token_mask.any(dim=1).all()


def test_times_noise_and_augmentation(shards):
    batches = batches_of(shards, config_of(num_flow_times=4))
    first, again = next(iter(batches)), next(iter(batches))
    torch.testing.assert_close(first.time, torch.tensor([0.125, 0.375, 0.625, 0.875]).expand(4, 4))
    assert first.noise.shape == (4, 4, 4, 3) and torch.equal(first.noise, again.noise)
    assert not first.indicator_dropped.any() and (first.slot == -1).all() and (first.augmentation == 0.5).all()


def test_a_choice_of_all_changes_only_by_what_is_added(tmp_path):
    config = config_of(max_samples=1000, batch_size=64)
    first = write_tiny(tmp_path, [flat_episode(i, 4) for i in range(20)])
    before = next(iter(batches_of(first, config)))
    more = write_tiny(tmp_path, [flat_episode(i, 4, source="auto") for i in range(20)])
    after = torch.cat([batch.noise for batch in batches_of(more, config)])[:, 0, 0, 0]
    assert before.sample_valid.sum() > 8
    assert np.isin(before.noise[before.sample_valid, 0, 0, 0], after).all()


def test_a_damaged_sample_is_left_out_and_reported(tmp_path):
    shard_set = mixed_set(tmp_path)
    config, log = config_of(max_samples=6, batch_size=8), tmp_path / "damaged.jsonl"
    sound = next(iter(batches_of(shard_set, config)))
    batches = batches_of(shard_set, config, damage_log=log)
    assert len(batches) == 1 and sound.sample_valid.sum() == 6
    damage(shard_set, batches.samples[2:3])
    batch = next(iter(batches))
    (row,) = torch.nonzero(batch.replaced)[:, 0].tolist()
    assert row == torch.nonzero(sound.sample_valid)[2, 0]
    others = torch.arange(9) != row
    assert torch.equal(batch.sample_valid, sound.sample_valid & others)
    assert torch.equal(batch.actions[others], sound.actions[others])
    assert torch.equal(batch.image_lender, sound.image_lender)
    assert json.loads(log.read_text())["slot"] == -1


def test_nothing_held_out_gives_no_batches(shards):
    config = tiny_config()
    assert len(batches_of(shards, config)) == 0 and list(batches_of(shards, config)) == []
