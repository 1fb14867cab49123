"""The first pass: who does which shard, and what a sweep over a shard shows the model."""

import numpy as np
import pytest
import torch

from recap_ds.batch import TransitionBatch
from recap_ds.data.assemble import Assembler
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.sidecars import sidecar_path
from recap_ds.data.sweep import SweepBatches, SweepDataset
from recap_ds.data.values import open_values, read_values
from recap_ds.label.values import pending_shards, share_of_rank, write_shard_values
from recap_ds.models.inference_value import PredictedValues
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import build_tokenizer
from tests.data.tiny_shards import mixed_set, scale_of, tiny_config
from tests.label.made_values import column_of, made_record

CONFIG = tiny_config(label={"batch_size": 6})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def dataset(shard_set) -> SweepDataset:
    manifest = shard_set.manifest
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), CONFIG)
    assembler = Assembler(shard_set, CONFIG, build_tokenizer("tiny"), normalizer, scale_of(CONFIG, manifest))
    return SweepDataset(assembler, CONFIG, normalizer, batch_size=6)


def grey(batch: TransitionBatch) -> torch.Tensor:
    """[B] the level of the first camera, which is 40 + frame: the model's way to say what it was shown."""
    return batch.observation.images[:, 0].float().mean(dim=(1, 2, 3)).round()


def test_every_shard_is_one_ranks_and_the_load_is_even(shard_set):
    sizes = np.diff(shard_set.shard_starts)
    pending = [shard for shard in range(len(sizes)) if shard != 4]
    for world in (1, 2, 3, len(sizes) + 2):
        shares = [share_of_rank(shard_set, pending, rank, world) for rank in range(world)]
        assert sorted(shard for share in shares for shard in share) == pending
        load = [int(sizes[share].sum()) for share in shares]
        assert max(load) - min(load) <= sizes.max()


def test_a_sweep_shows_every_sample_once_and_pads_the_last_batch(shard_set, dataset):
    for shard, entry in enumerate(shard_set.manifest.shards):
        batches = list(SweepBatches(shard_set, [shard], 6))
        assert len(batches) == len(SweepBatches(shard_set, [shard], 6))
        first, end = shard_set.shard_starts[shard : shard + 2]
        assert [sample for samples in batches for sample in samples] == list(range(first, end))
        last = dataset.batch(np.array(batches[-1]))
        num_real = entry.num_samples - 6 * (len(batches) - 1)
        assert last.sample_valid.tolist() == [row < num_real for row in range(6)]
        assert (grey(last)[:num_real] - 40).tolist() == shard_set.table.frame[batches[-1]].tolist()
        assert not last.td_valid[num_real:].any()


def test_files_hold_what_the_model_said_of_each_sample(shard_set, dataset):
    def predict(batch: TransitionBatch) -> PredictedValues:
        assert len(batch.task) == 6, "one size for every batch"
        return PredictedValues(grey(batch), batch.td_action_valid.sum(dim=1).float())

    record = made_record(shard_set, critic="iql")
    folder = open_values(shard_set.folder, "said", record)

    def pending() -> list[int]:
        return pending_shards(dataset, shard_set, folder, record)

    assert pending() == list(range(len(shard_set.manifest.shards)))
    lines: list[str] = []
    for share in ([2, 0], [], pending()[1:2]):
        write_shard_values(dataset, shard_set, share, folder, record, predict, CONFIG, CPU, lines.append)
    assert len(lines) == 3 and pending()[0] == 3
    write_shard_values(dataset, shard_set, pending(), folder, record, predict, CONFIG, CPU, lines.append)
    assert pending() == []
    stored = read_values(shard_set, "said")
    np.testing.assert_array_equal(stored.value, column_of(shard_set, lambda name, frame: 40 + frame))
    window = np.minimum(shard_set.table.num_valid, shard_set.manifest.td_horizon)
    np.testing.assert_array_equal(stored.action_advantage, window)


def test_a_shard_is_written_whole_or_not_at_all(shard_set, dataset):
    calls = []

    def predict(batch: TransitionBatch) -> PredictedValues:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return PredictedValues(grey(batch), None)

    record = made_record(shard_set)
    folder = open_values(shard_set.folder, "broken", record)
    with pytest.raises(RuntimeError, match="gone"):
        write_shard_values(dataset, shard_set, [0], folder, record, predict, CONFIG, CPU, print)
    assert not sidecar_path(folder, shard_set.manifest.shards[0].name).exists()
