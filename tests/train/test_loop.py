"""The loop's own decisions: when a run must stop, and which evaluation is the best. Whole runs: test_training.py."""

import math
from types import SimpleNamespace

import pytest

from recap_ds.errors import RunFailed, UsageError
from recap_ds.train import loop
from recap_ds.train.loop import Progress, check_damage, count_skipped, is_best
from recap_ds.train.run_folder import RunFolder
from tests.tiny import tiny_config


def session_of(**sections) -> SimpleNamespace:
    config = tiny_config(**sections)
    return SimpleNamespace(plan=SimpleNamespace(config=config, run=RunFolder(config)))


def test_skipped_steps_in_a_row_end_the_run_and_an_applied_one_forgives(monkeypatch):
    recorded = []
    monkeypatch.setattr(loop, "record_skipped", lambda session, step, batches, result: recorded.append(step))
    session, progress = session_of(training={"max_skipped_steps": 3}), Progress()
    for step, applied in enumerate((False, False, True, False, False), start=1):
        progress.step = step
        count_skipped(session, progress, [], SimpleNamespace(applied=applied))
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (4, 2)
    progress.step = 6
    with pytest.raises(RunFailed, match=r"step 6: 3 optimizer steps in a row .*skipped\.jsonl"):
        count_skipped(session, progress, [], SimpleNamespace(applied=False))
    assert recorded == [1, 2, 4, 5, 6], "every skipped step is written down, the last one too"


@pytest.mark.parametrize(
    ("fraction", "seen", "replaced", "stops"),
    [
        (0.001, 10, 1, False),  # judged over at least a thousand samples
        (0.001, 10, 2, True),
        (0.001, 5000, 5, False),  # the limit itself is allowed
        (0.001, 5000, 6, True),
        (0.0, 10, 0, False),
        (0.0, 5000, 1, True),
        (1.0, 10, 10, False),
    ],
)
def test_too_much_damage_ends_the_run(fraction, seen, replaced, stops):
    session = session_of(data={"max_damaged_fraction": fraction, "shards": "some/folder"})
    progress = Progress(samples_seen=seen, replaced_samples=replaced)
    if not stops:
        return check_damage(session, progress)
    with pytest.raises(UsageError) as error:
        check_damage(session, progress)
    assert f"{replaced} of {seen} samples" in str(error.value)
    assert "damaged.jsonl" in str(error.value) and "recap-ds shards verify some/folder" in str(error.value)
    return None


def test_best_is_the_lowest_finite_loss():
    progress = Progress()
    losses = [math.nan, 3.0, 3.0, math.inf, 2.5, math.nan, 2.6, -math.inf, 2.0]
    assert [is_best(progress, {"eval/loss": loss}) for loss in losses] == [
        False, True, False, False, True, False, False, False, True,
    ]  # fmt: skip
    assert progress.best_loss == 2.0
    assert not is_best(progress, {}), "an evaluation that has no loss"
