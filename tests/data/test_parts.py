"""Which samples of real shards make up each part of a mixture."""

from dataclasses import replace

import numpy as np
import pytest

from recap_ds.batch import SOURCE_IDS
from recap_ds.config import DataConfig
from recap_ds.data.parts import training_parts
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from tests.data.made_index import ids_of
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("shards"))


def test_parts_are_all_that_is_not_held_out_by_source(shards):
    parts = training_parts(shards, DataConfig(held_out_fraction=0.3))
    assert [part.name for part in parts] == list(SOURCE_IDS)
    together = np.sort(np.concatenate([ids_of(part) for part in parts]))
    np.testing.assert_array_equal(together, np.flatnonzero(~shards.held_out(0.3)))
    for part in parts:
        assert (shards.table.source[ids_of(part)] == SOURCE_IDS[part.name]).all()
        for place, shard in enumerate(part.samples.shards):
            assert {shards.shard_of(sample) for sample in part.samples.of_shard(place)} == {shard}
            assert part.samples.sizes[place] == len(part.samples.of_shard(place))


def test_a_data_set_named_anywhere_is_a_part_of_its_own(tmp_path):
    # "lab/two" was corrected by hand in places: its frames are of two sources.
    own = [replace(flat_episode(i, 9), name=f"lab/one/{i}") for i in range(3)]
    corrected = [flat_episode(i, 10, source="intervention", human=slice(4, 10)) for i in range(3)]
    corrected = [replace(episode, name=f"lab/two/{i}") for i, episode in enumerate(corrected)]
    shards = write_tiny(tmp_path, [flat_episode(i, 8) for i in range(2)] + own + corrected)
    data = DataConfig(
        held_out_fraction=0,
        mixture={"demo/lab/one": 1, "demo": 1},
        mixture_schedule={5: {"auto": 1}},
        max_epochs={"auto/lab/two": 3},
    )
    parts = training_parts(shards, data)
    assert {part.name: part.samples.num_samples for part in parts} == {
        "demo": 16,
        "demo/lab/one": 27,
        "auto/lab/two": 12,
        "intervention": 18,
    }
    names = {shards.episodes[shards.table.episode[sample]] for sample in ids_of(parts[1])}
    assert names == {f"lab/one/{i}" for i in range(3)}


@pytest.mark.parametrize("mixture", [None, {"auto/lab": 1}])
def test_filtered_imitation_leaves_out_what_failed_of_autonomous_episodes_alone(tmp_path, mixture):
    corrected = flat_episode(2, 8, source="intervention", outcome="failure", human=slice(3, 8))
    episodes = [flat_episode(0, 8, source="auto"), flat_episode(1, 8, source="auto", outcome="failure"), corrected]
    episodes.append(flat_episode(3, 8, outcome="failure"))
    episodes = [replace(episode, name=f"lab/{number}") for number, episode in enumerate(episodes)]
    shards = write_tiny(tmp_path, episodes)
    data = DataConfig(held_out_fraction=0, auto_episodes="successful", mixture=mixture)
    kept = {part.source: part.samples.num_samples for part in training_parts(shards, data)}
    # Eight frames of the success; of the corrected failure, the person's five.
    assert kept == {"demo": 8, "auto": 8, "intervention": 5}


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"mixture": {"demo/dmeo": 1}},
            "data.mixture.demo/dmeo: the shards hold no such sample to train on; data sets with demo samples are demo",
        ),
        ({"mixture_schedule": {3: {"auto/demo": 1}}}, "data.mixture_schedule.3.auto/demo: .* are auto, intervention"),
        ({"max_epochs": {"intervention/x": 1}}, "data.max_epochs.intervention/x: .* are intervention"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_line(shards, data, message):
    with pytest.raises(UsageError, match=message):
        training_parts(shards, DataConfig(**data))
