"""The best constant: mean actions of what training may draw, per task and source."""

from pathlib import Path

import numpy as np
import pytest

from recap_ds.batch import SOURCE_IDS
from recap_ds.data import baseline
from recap_ds.data.baseline import MeanActions, mean_actions
from recap_ds.data.sample import read_actions
from recap_ds.data.shard_set import ShardSet
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny

HELD_OUT = 0.3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("mixed"))


def own_actions(shards: ShardSet, task: int, source: int, held_out: bool) -> np.ndarray:
    table = shards.table
    keep = (table.task == task) & (table.source == source) & (shards.held_out(HELD_OUT) == held_out)
    return np.array([read_actions(shards, int(sample))[0] for sample in np.flatnonzero(keep)]).reshape(-1, 2)


def test_means_and_weights_are_those_of_the_training_samples(shards):
    assert shards.held_out(HELD_OUT).any(), "or the test says nothing"
    found = mean_actions(shards, HELD_OUT, seed=0)
    num_groups = 0
    for task, source in np.ndindex(found.weight.shape):
        actions = own_actions(shards, task, source, held_out=False)
        assert found.weight[task, source] == len(actions)
        if len(actions):
            num_groups += 1
            assert found.mean[task, source] == pytest.approx(actions.mean(axis=0), abs=1e-5)
        else:
            assert (found.mean[task, source] == 0).all()
    assert num_groups >= 4


def test_frames_of_one_episode_average_to_its_closed_form(tmp_path):
    # Episode 3: action (30 + t, -t) at frame t of 9, every frame a sample.
    shards = write_tiny(tmp_path, [flat_episode(3, 9)])
    found = mean_actions(shards, 0.0, seed=0)
    assert found.mean[0, SOURCE_IDS["demo"]] == pytest.approx([34.0, -4.0])
    assert found.weight.tolist() == [[9.0, 0.0, 0.0]]


def test_sources_join_by_how_often_they_occur():
    mean = np.array([[[1.0], [4.0], [100.0]], [[0.0], [7.0], [0.0]]])
    constant = MeanActions(mean, np.array([[2.0, 1.0, 5.0], [0.0, 3.0, 0.0]]))
    assert constant.per_task(["demo", "auto"]).tolist() == [[2.0], [7.0]]
    assert constant.per_task(["demo"]).tolist() == [[1.0], [7.0]], "a task without demos takes what it has"
    assert constant.per_task(list(SOURCE_IDS)).tolist() == [[(2 + 4 + 500) / 8], [7.0]]


def test_a_limited_choice_is_close_seeded_and_counts_everything(shards, monkeypatch):
    whole = mean_actions(shards, HELD_OUT, seed=0)
    monkeypatch.setattr(baseline, "MAX_SAMPLES", 12)
    some, again, other = (mean_actions(shards, HELD_OUT, seed) for seed in (0, 0, 1))
    assert np.array_equal(some.weight, whole.weight)
    assert np.array_equal(some.mean, again.mean) and not np.array_equal(some.mean, other.mean)
    task, source = np.unravel_index(whole.weight.argmax(), whole.weight.shape)
    spread = own_actions(shards, task, source, held_out=False).std(axis=0)
    assert (np.abs(some.mean - whole.mean)[task, source] < 4 * spread / np.sqrt(12)).all()


def test_damage_is_left_out(tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(3, 9)])
    whole = mean_actions(shards, 0.0, seed=0)
    (tar,) = Path(tmp_path).glob("*.tar")
    sound = tar.read_bytes()
    start, end = (int(shards.table.start[i]) for i in (4, 5))
    tar.write_bytes(sound[: start + 600] + bytes(end - start - 600) + sound[end:])
    lost = int(shards.table.frame[4])
    found = mean_actions(ShardSet.open(tmp_path), 0.0, seed=0)
    expected = (whole.mean[0, 0] * 9 - np.array([30.0 + lost, -lost])) / 8
    assert found.mean[0, 0] == pytest.approx(expected)
    tar.write_bytes(bytes(len(sound)))
    nothing = mean_actions(ShardSet.open(tmp_path), 0.0, seed=0)
    assert (nothing.mean == 0).all() and (nothing.weight == 0).all(), "a mean of nothing weighs nothing"
