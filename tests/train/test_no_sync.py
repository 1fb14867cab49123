"""The step's path reads nothing from the device: it runs where there is nothing to read.

On torch's meta device every ``.item()``, ``.tolist()``, copy to the host, branch on a tensor and result whose shape
depends on values raises, so a step that ends there cannot have waited for a device. What DeepSpeed itself does inside
``engine.step`` is not ours to test.
"""

from types import SimpleNamespace

import pytest
import torch

from recap_ds.algo.advantage import AdvantageRing, AdvantageScale
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.plan.measure import build_on_meta
from recap_ds.train import step as step_module
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.session import Session
from recap_ds.train.spikes import SpikeGuard
from recap_ds.train.step import take_step
from tests.tiny import random_batch, tiny_config

META = torch.device("meta")
TASKS = ["cube", "cup"]
CRITIC = {"training": {"stage": "critic"}, "value": {"critic": "distributional"}}
STAGES = {
    "joint": {"model": {"freeze_vlm": False}, "data": {"augmentation": "shift_and_color"}},
    "joint, frozen, weighted": {"recap": {"policy_extraction": "both"}},
    "policy": {"training": {"stage": "policy"}, "recap": {"sft": True}},
    "critic": CRITIC,
}


class MetaEngine:
    def __init__(self, policy):
        groups = policy.parameter_groups()
        self.optimizer = SimpleNamespace(param_groups=groups)
        self.peaks = {group["name"]: group["lr"] for group in groups}
        self._policy = policy
        self.num_steps = 0

    def __call__(self, *arguments):
        return self._policy(*arguments)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.num_steps += 1


@pytest.fixture
def engine_answers(monkeypatch):
    """What take_step asks of the engine, answered without one."""
    monkeypatch.setattr(step_module, "zero_stale_gradients", lambda engine: None)
    monkeypatch.setattr(step_module, "step_was_applied", lambda engine: True)
    monkeypatch.setattr(step_module, "global_grad_norm", lambda engine: torch.empty((), device=META))


def session_of(config) -> Session:
    policy = build_on_meta(config, torch.float32, None)
    engine = MetaEngine(policy)
    shadows = {}
    if "target_critic" in config.heads:
        shadows["target"] = SimpleNamespace(lerp=lambda rate: policy.update_targets())
    config_only, runtime = SimpleNamespace(config=config), Runtime(RankInfo(), META, "gloo")
    ring = scale = None
    if config.training.stage == "joint":
        ring = AdvantageRing(len(TASKS), config.recap.advantage_window, META)
    else:
        numbers = torch.empty(len(TASKS), device=META)
        scale = AdvantageScale(numbers, numbers, numbers.bool())
    guard = SpikeGuard(window=4, min_steps=1, deviations=6.0, device=META)
    return Session(config_only, runtime, engine, shadows, ring, engine.peaks, scale, spikes=guard)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_reads_nothing_from_the_device(stage, engine_answers):
    overrides = STAGES[stage]
    config = tiny_config(**overrides | {"training": {"ema_decay": None, **overrides.get("training", {})}})
    session = session_of(config)
    metrics = StepMetrics(config, TASKS, META)
    for step in (0, 15):  # in the critics' warm-up and after it
        result = take_step(session, step, [random_batch(config, 3, seed) for seed in (1, 2)], metrics, False)
    assert session.engine.num_steps == 4
    assert result.batch.actions.is_meta and result.losses_finite.shape == (6,)
    assert all(
        parameter.grad is not None for group in session.engine.optimizer.param_groups for parameter in group["params"]
    )


def test_the_meta_device_refuses_what_would_wait():
    number = torch.ones((), device=META)
    for wait in (
        number.item,
        number.tolist,
        number.cpu,
        number.nonzero,
        lambda: float(number),
        lambda: bool(number > 0),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
