"""Collecting per-sample results over batches: order, padding and masks."""

from collections.abc import Iterator

import numpy as np
import torch

from recap_ds.batch import TransitionBatch, map_tensors
from recap_ds.evaluate.records import Records, collect_records
from recap_ds.models.losses import EvaluationOutput
from tests.tiny import random_batch, tiny_config

CONFIG = tiny_config()
NUM_SAMPLES = 10
CPU = torch.device("cpu")


def judged(batch: TransitionBatch) -> EvaluationOutput:
    """A model whose every answer is made of the sample itself."""
    first = batch.actions[:, 0, 0]
    return EvaluationOutput(
        flow_loss=torch.stack([first, first + 1, first + 2], dim=1),
        q_loss=first * 2,
        v_loss=first * 3,
        q=first * 4,
        v=first * 5,
        v_shuffled=first * 8,
        actions=batch.actions + 1,
        unconditioned_actions=batch.actions - 1,
    )


def padded_batches(whole: TransitionBatch, size: int) -> Iterator[TransitionBatch]:
    """``whole`` in batches of ``size``; the last is filled up with copies of its first row, not valid."""
    for first in range(0, NUM_SAMPLES, size):
        present = min(size, NUM_SAMPLES - first)
        rows = torch.tensor([*range(first, first + present), *[0] * (size - present)])
        batch = map_tensors(lambda tensor, rows=rows: tensor[rows], whole)
        yield batch._replace(sample_valid=torch.arange(size) < present, image_lender=torch.arange(size))


def test_records_keep_the_order_and_drop_the_padding():
    whole = random_batch(CONFIG, NUM_SAMPLES, seed=1)
    expected = collect_records(judged, [whole], CPU)
    assert isinstance(expected, Records) and len(expected.task) == NUM_SAMPLES
    first = whole.actions[:, 0, 0].double().numpy()
    assert np.array_equal(expected.q, 4 * first) and np.array_equal(expected.v_shuffled, 8 * first)
    assert np.array_equal(expected.true_actions, whole.actions.double().numpy())
    for size in (3, 4, 16):
        for name, column in collect_records(judged, padded_batches(whole, size), CPU)._asdict().items():
            assert np.array_equal(column, getattr(expected, name)), (size, name)


def test_a_damaged_row_in_the_middle_is_dropped():
    whole = random_batch(CONFIG, NUM_SAMPLES, seed=1)
    valid = torch.arange(NUM_SAMPLES) != 4
    records = collect_records(judged, [whole._replace(sample_valid=valid)], CPU)
    assert np.array_equal(records.mc_return, whole.mc_return[valid].double().numpy())


def test_a_lender_that_cannot_be_read_leaves_nothing_to_compare():
    whole = random_batch(CONFIG, NUM_SAMPLES, seed=1)
    damaged = torch.arange(NUM_SAMPLES) == 4
    records = collect_records(judged, [whole._replace(sample_valid=~damaged, replaced=damaged)], CPU)
    assert whole.image_lender[5] == 4, "its images are the next row's"
    assert np.flatnonzero(np.isnan(records.v_shuffled)).tolist() == [4], "row 5, without the one before"
    assert np.isfinite(records.v).all()


def test_types_and_the_action_mask():
    whole = random_batch(CONFIG, NUM_SAMPLES, seed=1)
    records = collect_records(judged, [whole], CPU)
    assert {getattr(records, name).dtype for name in ("task", "source", "control", "outcome")} == {np.dtype("int64")}
    assert {getattr(records, name).dtype for name in ("mc_valid", "td_valid", "action_mask")} == {np.dtype("bool")}
    for row in range(NUM_SAMPLES):
        for frame in range(CONFIG.chunk_size):
            for dim in range(CONFIG.max_action_dim):
                there = bool(whole.action_valid[row, frame] and whole.action_dim_mask[row, dim])
                assert records.action_mask[row, frame, dim] == there
