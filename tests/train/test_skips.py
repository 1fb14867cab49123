"""What becomes of skipped steps: for gradients that are not finite, for spikes, and rolling back."""

from types import SimpleNamespace

import pytest
import torch

from recap_ds.errors import RunFailed
from recap_ds.train import rollback, skips
from recap_ds.train.progress import Progress
from recap_ds.train.run_folder import RunFolder
from recap_ds.train.session import RunWatch
from recap_ds.train.spikes import SpikeJudgement
from tests.tiny import tiny_config


class Said(list):
    """A logbook of which only the lines for people are kept."""

    say = list.append


def session_of(**training) -> SimpleNamespace:
    config = tiny_config(training=training)
    plan = SimpleNamespace(config=config, run=RunFolder(config))
    return SimpleNamespace(plan=plan, watch=RunWatch(), runtime=None, engine=None, shadows={})


def result_of(applied: bool, spike: bool | None = None) -> SimpleNamespace:
    judged = spike is not None and SpikeJudgement(torch.tensor(9.0), torch.tensor(2.5), torch.tensor(spike))
    return SimpleNamespace(applied=applied, spike=judged or None)


@pytest.fixture
def recorded(monkeypatch):
    steps = {"skipped": [], "spikes": []}
    monkeypatch.setattr(skips, "record_skipped", lambda session, step, *_: steps["skipped"].append(step))
    monkeypatch.setattr(skips, "record_spike", lambda session, step, *_: steps["spikes"].append(step))
    return steps


def test_steps_without_finite_gradients_end_the_run_and_an_applied_one_forgives(recorded):
    session, progress, book = session_of(max_skipped_steps=3), Progress(), Said()
    for step, applied in enumerate((False, False, True, False, False), start=1):
        progress.step = step
        assert not skips.count_skipped(session, progress, book, [], result_of(applied))
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (4, 2)
    progress.step = 6
    with pytest.raises(RunFailed, match=r"step 6: 3 optimizer steps in a row .*skipped\.jsonl"):
        skips.count_skipped(session, progress, book, [], result_of(False))
    assert recorded == {"skipped": [1, 2, 4, 5, 6], "spikes": []}, "every skipped step is written down, the last too"


def test_spikes_are_counted_apart_and_told(recorded):
    session, progress, book = session_of(spike_action="skip", spike_max_in_a_row=2), Progress(), Said()
    outcomes = [(False, True), (True, False), (False, True), (False, False), (False, True)]
    asked = []
    for step, (applied, spike) in enumerate(outcomes, start=1):
        progress.step = step
        asked.append(skips.count_skipped(session, progress, book, [], result_of(applied, spike)))
    assert asked == [False, False, False, False, True]
    assert recorded == {"skipped": [4], "spikes": [1, 3, 5]}
    assert (progress.spikes, progress.spikes_in_a_row, progress.skipped_steps) == (3, 2, 1)
    assert book[-1].startswith(
        "warning: step 5 was skipped: its loss 9 is above 2.5 (2 of training.spike_max_in_a_row=2); its samples are in "
    )


def test_skipping_without_rolling_back_ends_where_nothing_else_comes():
    with pytest.raises(RunFailed, match=r"step 7: 5 steps in a row were loss spikes, see .*spikes\.jsonl; lower the"):
        rollback.roll_back(session_of(spike_action="skip"), Progress(step=7, spikes_in_a_row=5), Said(), None)


def test_rolling_back_is_bounded():
    session = session_of(spike_action="rollback", spike_max_rollbacks=2)
    with pytest.raises(RunFailed, match=r"training\.spike_max_rollbacks=2 times before; lower"):
        rollback.roll_back(session, Progress(step=7, spikes_in_a_row=5, rollbacks=2), Said(), None)


def test_without_an_earlier_checkpoint_there_is_no_way_back(monkeypatch):
    asked = []
    monkeypatch.setattr(rollback, "find_checkpoint", lambda folder, runtime, up_to_step: asked.append(up_to_step))
    saver = SimpleNamespace(finish=lambda: None)
    progress = Progress(step=9, spikes_in_a_row=3, skipped_in_a_row=1)
    with pytest.raises(RunFailed, match=r"there is no checkpoint from before them"):
        rollback.roll_back(session_of(spike_action="rollback"), progress, Said(), saver)
    assert asked == [5], "the last step that changed a weight"
