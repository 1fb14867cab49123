"""The loop's own decisions: when a run must stop. Gates: test_gate.py. Whole runs: test_training.py."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from recap_ds.errors import RunFailed, UsageError
from recap_ds.train import loop
from recap_ds.train.gate import GateState
from recap_ds.train.loop import Progress, check_damage, count_skipped
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


def test_progress_comes_back_from_a_checkpoint():
    progress = Progress(step=7, gate=GateState("mae", 0.25, 2), wandb_id="x")
    assert Progress.restore(json.loads(json.dumps(asdict(progress)))) == progress
    before_gates = {name: value for name, value in asdict(progress).items() if name != "gate"} | {"best_loss": 0.5}
    assert Progress.restore(before_gates).gate == GateState("loss", 0.5, 0)
