"""Whose images a held-out sample is shown: another episode's of its task, the same in every batch and on every rank."""

import numpy as np
import pytest
import torch

from recap_ds.data.held_out import EvaluationBatches, choose_samples, plan_batches
from recap_ds.data.partners import RUN, Lending, lend_images
from recap_ds.data.shard_set import ShardSet
from tests.data.test_assemble import assembler_of
from tests.data.tiny_shards import flat_episode, mixed_set, tiny_config, write_tiny

FRACTION = 0.4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("shards"))


def lending_of(shard_set: ShardSet, max_samples: int = 10**6, fraction: float = FRACTION) -> Lending:
    return lend_images(shard_set, choose_samples(shard_set, fraction, max_samples), fraction)


def rows_read(lending: Lending, batch_size: int) -> int:
    return sum(len(rows.samples) for rows in plan_batches(lending, batch_size + 1))


def test_the_lender_is_of_another_episode_of_the_task(shards):
    for max_samples in (5, 24, 10**6):
        chosen = choose_samples(shards, FRACTION, max_samples)
        sample, lender = lending_of(shards, max_samples)
        np.testing.assert_array_equal(np.sort(sample), chosen)
        assert (shards.table.episode[sample] != shards.table.episode[lender]).all()
        np.testing.assert_array_equal(shards.table.task[sample], shards.table.task[lender])


def test_who_lends_does_not_depend_on_the_batch_size_or_the_ranks(shards):
    """Seen in the batches themselves: a tiny sample's state is its episode and frame."""
    found = []
    for batch_size, world in ((1, 1), (3, 1), (3, 2), (64, 1), (5, 4)):
        config = tiny_config(data={"held_out_fraction": FRACTION}, evaluation={"batch_size": batch_size})
        pairs = []
        for rank in range(world):
            for batch in EvaluationBatches(assembler_of(shards, config), config, rank=rank, world=world):
                assert len(batch.sample_valid) == batch_size + 1
                state, lender = batch.observation.state, batch.image_lender
                both = torch.cat([state, state[lender]], dim=1)[batch.sample_valid]
                pairs += [tuple(row) for row in both.tolist()]
        found.append(sorted(pairs))
    assert len(found[0]) == shards.held_out(FRACTION).sum() and all(pairs == found[0] for pairs in found)


def test_hardly_a_sample_is_read_twice(shards):
    lending = lending_of(shards)
    num_tasks = len(np.unique(shards.table.task[lending.sample]))
    for batch_size in (4, 16):
        num_batches = len(plan_batches(lending, batch_size + 1))
        most = len(lending.sample) * (1 + 1 / RUN) + num_batches + num_tasks
        assert rows_read(lending, batch_size) <= most


def test_the_images_shown_are_of_another_moment(tmp_path):
    """Neighbours in time have about the same value: a lender's frame says nothing of the sample's."""
    shard_set = write_tiny(tmp_path, [flat_episode(i, 60) for i in range(8)], samples_per_shard=256)
    sample, lender = lending_of(shard_set)
    frame = shard_set.table.frame
    assert len(sample) > 100 and abs(np.corrcoef(frame[sample], frame[lender])[0, 1]) < 0.2


def test_a_long_episode_borrows_from_the_short_ones_in_turn(tmp_path):
    """Episode 3 is held out with two of three frames; in rounds it alone is left at the end."""
    shard_set = write_tiny(tmp_path, [flat_episode(i, 40 if i == 3 else 3) for i in range(8)])
    sample, lender = lending_of(shard_set)
    episode = shard_set.table.episode
    counts = np.bincount(episode[sample])
    assert counts.max() == 40 and (counts > 0).sum() > 1, "or the hashes have changed"
    assert (episode[sample] != episode[lender]).all()
    _, uses = np.unique(lender, return_counts=True)
    assert uses.max() <= 2 * RUN and rows_read(lending_of(shard_set), 64) == len(sample)
    assert rows_read(lending_of(shard_set), 8) < 1.5 * len(sample)


def test_a_task_with_one_held_out_episode_borrows_from_training(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(i, 30, task=f"task{i // 2}") for i in range(6)])
    held_out, table = shard_set.held_out(0.001), shard_set.table
    sample, lender = lending_of(shard_set, fraction=0.001)
    assert len(np.unique(table.episode[sample])) == 3 and len(sample) == 90
    assert not held_out[lender].any()
    np.testing.assert_array_equal(table.task[sample], table.task[lender])
    assert len(np.unique(lender)) > 3 * 2, "not one picture for all"
    assert rows_read(Lending(sample, lender), 32) <= 90 + 3 * (30 // RUN + 1) + len(sample) // 32


def test_what_lends_twice_in_a_batch_is_there_once():
    lending = Lending(np.array([5, 6, 7, 8]), np.array([9, 9, 6, 5]))
    (rows,) = plan_batches(lending, 5)
    assert rows.samples == [9, 5, 6, 7, 8] and rows.evaluated == [False, True, True, True, True]
    assert rows.image_lender == [0, 0, 0, 2, 1]
    first, second, *_ = plan_batches(lending, 3)
    assert first.samples == [9, 5, 6] and second.samples == [6, 7] and second.evaluated == [False, True]
