"""One optimizer step around an engine that records what it is asked: order, normalisers, what a skipped step leaves."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import AdvantageRing, forced_positive
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.models.losses import count_flow_elements
from recap_ds.train import step as step_module
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.session import Session, plan_session
from recap_ds.train.skips import record_skipped, record_spike
from recap_ds.train.spikes import SpikeJudgement
from recap_ds.train.step import StepResult, step_normalizers, take_step
from tests.distributed.harness import REPOSITORY
from tests.tiny import random_batch, tiny_config
from tests.train.made_outputs import made_output

CPU = torch.device("cpu")
TASKS = ["cube", "cup"]
ALONE = Runtime(RankInfo(), CPU, "gloo")


class FakeEngine:
    """Answers with made outputs; ``broken``: the micro-batches whose row 2 has a Q loss that is not finite."""

    def __init__(self, config, broken=()):
        self.optimizer = SimpleNamespace(param_groups=[{"name": "action_expert", "lr": 0.0}])
        self.scales, self.normalizers, self.warming_up, self.calls = [], [], [], []
        self._config, self._broken = config, broken

    def __call__(self, batch, mode, scale, counts, warming_up):
        assert mode == "train"
        number = len(self.scales)
        self.calls.append("forward")
        self.scales.append(scale)
        self.normalizers.append(counts)
        self.warming_up.append(warming_up)
        output = made_output(self._config, batch, seed=number)
        if number in self._broken:
            output.q_loss[2] = math.nan
            output = output._replace(loss=torch.tensor(math.nan))
        return output

    def backward(self, loss):
        self.calls.append("backward")

    def step(self):
        self.calls.append("step")


class FakeShadow:
    def __init__(self):
        self.rates = []

    def lerp(self, rate):
        self.rates.append(rate)


@pytest.fixture
def session_of(monkeypatch):
    def made(config, broken=()) -> Session:
        engine = FakeEngine(config, broken)
        monkeypatch.setattr(step_module, "zero_stale_gradients", lambda engine: engine.calls.append("clear"))
        monkeypatch.setattr(step_module, "step_was_applied", lambda engine: not broken)
        monkeypatch.setattr(step_module, "global_grad_norm", lambda engine: torch.tensor(1.5))
        monkeypatch.setattr(step_module, "grad_norms_by_group", lambda engine: engine.calls.append("norms"))
        ring = AdvantageRing(len(TASKS), config.recap.advantage_window, CPU)
        shadows = {"target": FakeShadow(), "ema": FakeShadow()}
        return Session(SimpleNamespace(config=config), ALONE, engine, shadows, ring, {"action_expert": 1e-3})

    return made


def run_step(session: Session, batches, step=5, with_group_norms=False) -> StepResult:
    metrics = StepMetrics(session.plan.config, TASKS, CPU)
    return take_step(session, step, batches, metrics, with_group_norms)


def three_batches(config):
    return [random_batch(config, 8, seed=number)._replace(slot=torch.arange(8) + 8 * number) for number in range(3)]


def test_the_order_is_deepspeeds_law(session_of):
    config = tiny_config()
    session = session_of(config)
    run_step(session, three_batches(config), with_group_norms=True)
    assert session.engine.calls == ["forward", "backward", "step"] * 2 + [
        "forward",
        "backward",
        "norms",
        "step",
        "clear",
    ]
    assert session.engine.optimizer.param_groups[0]["lr"] > 0
    assert session.shadows["target"].rates == [config.iql.target_update_rate]
    assert session.shadows["ema"].rates == pytest.approx([1 - config.training.ema_decay])


def test_normalisers_are_the_steps_totals_over_its_micro_batches():
    config = tiny_config()
    batches = three_batches(config)
    flow, td, monte_carlo, _ = step_normalizers(batches, CPU)
    assert flow.item() == pytest.approx(sum(count_flow_elements(batch).sum().item() for batch in batches) / 3)
    assert td.item() == pytest.approx(sum(batch.td_valid.sum().item() for batch in batches) / 3)
    assert monte_carlo.item() == pytest.approx(sum(batch.mc_valid.sum().item() for batch in batches) / 3)
    nothing = [batch._replace(td_valid=torch.zeros(8, dtype=torch.bool)) for batch in batches]
    assert step_normalizers(nothing, CPU).td.item() == 1.0


def test_the_ring_takes_free_samples_with_a_target_after_all_micro_batches(session_of):
    config = tiny_config(recap={"advantage_window": 16, "advantage_window_min": 2})
    session, batches = session_of(config), three_batches(config)
    run_step(session, batches)
    assert all(torch.isinf(scale.threshold).all() for scale in session.engine.scales), "thresholds of the step before"
    held = {task: [] for task in range(len(TASKS))}
    for number, batch in enumerate(batches):
        advantage = made_output(config, batch, seed=number).advantage
        for row in range(8):
            if batch.td_valid[row] and not forced_positive(batch.source, "positive")[row]:
                held[int(batch.task[row])].append(advantage[row].item())
    state = session.ring.state_dict()
    assert state["counts"].tolist() == [len(held[0]), len(held[1])]
    for task, values in held.items():
        assert state["values"][task, : len(values)].tolist() == values, "in slot order"
    run_step(session, batches)
    assert torch.isfinite(session.engine.scales[-1].threshold).all()


def test_warming_up_ends_at_its_step(session_of):
    config = tiny_config(recap={"indicator_warmup_steps": 4})
    session = session_of(config)
    for step in (3, 4):
        run_step(session, three_batches(config)[:1], step=step)
    assert session.engine.warming_up == [True, False]


def test_a_skipped_step_moves_nothing_and_marks_its_suspects_in_any_micro_batch(session_of):
    config = tiny_config()
    session = session_of(config, broken=(0, 2))
    result = run_step(session, three_batches(config))
    assert not result.applied
    assert torch.nonzero(~result.losses_finite).flatten().tolist() == [2, 18]
    assert session.shadows["target"].rates == session.shadows["ema"].rates == []
    assert session.ring.state_dict()["counts"].tolist() == [0, 0]


def test_the_line_of_a_skipped_step_names_the_bad_samples(reach_shards, tmp_path):
    data = {"shards": reach_shards, "num_workers": 0}
    config = tiny_config(
        chunk_size=10, runs_dir=str(tmp_path), data=data, model={"max_prompt_tokens": 40}, training={"batch_size": 4}
    )
    plan = plan_session(config, REPOSITORY / "ds_configs" / "zero3.json", RankInfo())
    plan.run.path.mkdir()
    ring = AdvantageRing(len(plan.tasks), 16, CPU)
    session = Session(plan, ALONE, None, {}, ring, {})
    batches = [plan.dataset.batch(np.arange(first, first + 4)) for first in (8, 12)]
    losses = torch.ones(8)
    losses[[1, 6]] = torch.tensor([math.nan, math.inf])  # one in each micro-batch
    result = StepResult(False, batches[-1], None, losses, torch.tensor(math.inf), None)
    for step in (3, 4):
        record_skipped(session, step, batches, result)
    lines = [json.loads(line) for line in plan.run.skipped.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    first = lines[0]
    assert (first["rank"], first["first_slot"], first["last_slot"]) == (0, 8, 15)
    samples = plan.dataset.order.samples(np.array([9, 14]))[1]
    shard_set = plan.dataset.assembler.shard_set
    assert len(first["suspects"]) == 2
    for sample, said in zip(samples, first["suspects"], strict=True):
        tar = shard_set.manifest.shards[shard_set.shard_of(int(sample))].name
        assert tar in said and shard_set.damaged(int(sample), "").key in said
    spike = SpikeJudgement(torch.tensor(7.5), torch.tensor(2.0), torch.tensor(True))
    record_spike(session, 5, batches, result._replace(sample_losses=torch.arange(8.0), spike=spike))
    (line,) = [json.loads(line) for line in plan.run.spikes.read_text().splitlines()]
    assert (line["step"], line["first_slot"], line["last_slot"], line["loss"], line["bound"]) == (5, 8, 15, 7.5, 2.0)
    assert [worst["loss"] for worst in line["worst"]] == [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert (
        shard_set.damaged(int(plan.dataset.order.samples(np.array([15]))[1][0]), "").key in line["worst"][0]["sample"]
    )
