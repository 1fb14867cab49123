"""The loop's own decisions: when a run must stop. Gates: test_gate.py. Whole runs: test_training.py."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from recap_ds.errors import RunStopped, UsageError
from recap_ds.train import loop, reporting
from recap_ds.train.gate import GateState
from recap_ds.train.loop import check_damage
from recap_ds.train.progress import Progress
from recap_ds.train.run_folder import RunFolder
from recap_ds.train.session import RunWatch
from recap_ds.train.stopping import STOP_FILE
from tests.tiny import tiny_config


def session_of(**sections) -> SimpleNamespace:
    config = tiny_config(**sections)
    return SimpleNamespace(plan=SimpleNamespace(config=config, run=RunFolder(config)))


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


class FakeHeldOut:
    """Held-out evaluations whose loss is known beforehand."""

    num_samples = 1

    def __init__(self, losses: list[float]):
        self.left = list(losses)

    def run(self) -> dict[str, float]:
        return {"eval/loss": self.left.pop(0)}


class FakeLogbook:
    def __init__(self):
        self.said = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def tick(self) -> None: ...


class FakeSaver:
    """Takes no time; fails where it is told to."""

    writing = False

    def __init__(self, failing: tuple[int, ...] = ()):
        self.failing, self.saves, self.finished, self.newest_step = failing, [], False, None

    def save(self, step: int, state: dict, tensors: dict, *, best: bool, last: bool) -> bool:
        self.saves.append((step, best) if not last else (step, best, "last"))
        if step in self.failing and not last:
            return False
        self.newest_step = step
        return True

    def advance(self, writing_anywhere: bool) -> None: ...

    def finish(self) -> None:
        self.finished = True


class FakeRequests:
    """Asks for a stop from its n-th step boundary on."""

    def __init__(self, stop_from: int):
        self.polls, self.stop_from = 0, stop_from

    def poll(self) -> int:
        self.polls += 1
        return STOP_FILE if self.polls > self.stop_from else 0


@pytest.fixture
def run_steps(monkeypatch):
    """``take_steps`` around steps that do nothing: (progress, losses) -> (last evaluation, saves, logbook)."""
    metrics = SimpleNamespace(summarise=lambda batch, output: {"data/replaced_samples": 0})
    monkeypatch.setattr(reporting, "StepMetrics", lambda *_: metrics)
    monkeypatch.setattr(loop, "build_loader", lambda *_: itertools.repeat(None))
    applied = SimpleNamespace(applied=True, batch=None, output=None)
    monkeypatch.setattr(loop, "take_step", lambda *_, **__: applied)
    monkeypatch.setattr(reporting, "step_figures", lambda *_: {})

    def run(progress: Progress, losses: list[float], failing: tuple[int, ...] = (), stop_from: int = 99, **training):
        config = tiny_config(
            training={"num_training_steps": 20, **training},
            evaluation={"every_steps": 2},
            checkpoint={"save_every_steps": 5},
        )
        sizes = SimpleNamespace(accumulation=1, total=8)
        plan = SimpleNamespace(config=config, sizes=sizes, tasks=[], run=RunFolder(config), corrections="positive")
        runtime = SimpleNamespace(device=torch.device("cpu"))
        session = SimpleNamespace(plan=plan, runtime=runtime, tensors=dict, watch=RunWatch(FakeRequests(stop_from)))
        logbook, saver = FakeLogbook(), FakeSaver(failing)
        try:
            evaluation = loop.take_steps(session, progress, FakeHeldOut(losses), logbook, saver)
        except RunStopped as stopped:
            evaluation = str(stopped)
        assert saver.finished, "nothing is left in writing"
        return evaluation, saver.saves, logbook

    return run


def test_a_run_that_gets_no_better_stops_early_and_saves_where_it_stopped(run_steps):
    progress = Progress()
    evaluation, saves, logbook = run_steps(progress, [3.0, 2.0, 2.5, 2.5], early_stop_evaluations=2)
    assert progress.step == 8 and evaluation == {"eval/loss": 2.5}
    assert saves == [(2, True), (4, True), (5, False), (8, False, "last")]
    assert progress.gate == GateState("loss", 2.0, 2)
    assert [line for line in logbook.said if "stopping at step 8" in line and "at 2.0000" in line]
    # Started again after that save, it takes no further step.
    evaluation, again, _ = run_steps(Progress.restore(asdict(progress)), [2.5], early_stop_evaluations=2)
    assert evaluation == {"eval/loss": 2.5} and again == []


def test_a_best_that_could_not_be_saved_was_not_the_best(run_steps):
    progress = Progress()
    _, saves, _ = run_steps(progress, [3.0, 1.0, 2.0, *[3.0] * 7], failing=(4,))
    assert saves[:4] == [(2, True), (4, True), (5, False), (6, True)]
    assert progress.gate.best == 2.0


def test_without_patience_a_run_goes_to_its_end(run_steps):
    progress = Progress()
    run_steps(progress, [2.0, *[3.0] * 9])
    assert progress.step == 20 and progress.gate.evaluations_since_best == 9


@pytest.mark.parametrize(
    ("stop_from", "failing", "saved"),
    [
        (6, (), [(2, True), (4, True), (5, False), (6, True), (7, False, "last")]),
        (4, (), [(2, True), (4, True), (5, False)]),  # that step is saved already
        (4, (5,), [(2, True), (4, True), (5, False), (5, False, "last")]),  # it should have been
    ],
)
def test_a_stop_saves_one_step_after_it_was_asked_for(run_steps, stop_from, failing, saved):
    progress = Progress()
    told, saves, logbook = run_steps(progress, [9.0 - i for i in range(10)], failing, stop_from)
    assert progress.step == stop_from + 1 and saves == saved
    assert told == logbook.said[-1]
    assert told.startswith(f"stopped at step {progress.step} of 20 (the stop file): ")
