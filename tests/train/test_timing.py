"""StepTimes with a clock that the test moves."""

import pytest
import torch

from recap_ds.train import timing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def take(times: timing.StepTimes, clock: Clock, wait: float, compute: float) -> None:
    times.start()
    clock.now += wait
    times.data_ready()
    clock.now += compute
    times.stop(num_samples=6)


def test_medians_waits_and_speed(clock):
    times = timing.StepTimes(torch.device("cpu"))
    clock.now += 50.0  # what happens before the first step is not training
    for compute in (1.0, 2.0, 6.0):
        take(times, clock, wait=0.5, compute=compute)
    figures = times.summarise()
    assert figures["time/step_p50_seconds"] == pytest.approx(2.5)
    assert figures["time/step_p95_seconds"] == pytest.approx(2.5 + 0.9 * 4.0)  # linear between 2.5 and 6.5
    assert figures["time/data_wait_seconds"] == pytest.approx(0.5)
    assert figures["time/samples_per_second"] == pytest.approx(18 / 10.5)
    assert figures["memory/peak_bytes"] > 0


def test_a_summary_starts_again_and_evaluation_in_between_is_not_training(clock):
    times = timing.StepTimes(torch.device("cpu"))
    take(times, clock, wait=0.0, compute=5.0)
    times.summarise()
    clock.now += 1000.0
    take(times, clock, wait=1.0, compute=1.0)
    figures = times.summarise()
    assert figures["time/step_p50_seconds"] == figures["time/step_p95_seconds"] == pytest.approx(2.0)
    assert figures["time/samples_per_second"] == pytest.approx(3.0)
