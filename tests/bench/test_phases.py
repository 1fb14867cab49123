import pytest

from recap_ds.bench import phases
from recap_ds.bench.phases import PHASES, PhaseClock, Watched


@pytest.fixture
def sleep(monkeypatch):
    """A clock that only this moves."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(phases, "wait_for_device", lambda: None)

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


class Engine:
    def __init__(self, sleep):
        self.sleep = sleep

    def step(self, seconds):
        self.sleep(seconds)
        return seconds


def test_phases_exclude_each_other_and_add_up(sleep):
    clock = PhaseClock()
    sleep(1)
    with clock.phase("backward"):
        sleep(2)
        with clock.phase("communication"):
            sleep(4)
        sleep(8)
    sleep(16)
    seconds = clock.stop()
    assert (seconds["backward"], seconds["communication"], seconds["other"]) == (10, 4, 17)
    assert sum(seconds.values()) == 31
    assert tuple(seconds) == PHASES


def test_watched_methods_count_and_come_back(sleep):
    engine, clock = Engine(sleep), PhaseClock()
    other = Engine(sleep)
    other.step = replaced = lambda seconds: sleep(2 * seconds)
    calls = [
        Watched(engine, "step", "optimizer"),
        Watched(other, "step", "shadows"),
        Watched(Engine, "step", "forward"),
    ]
    with clock.watching(calls[:2]):
        assert engine.step(3) == 3
        other.step(5)
    assert "step" not in vars(engine) and other.step is replaced
    original = Engine.step
    with pytest.raises(ZeroDivisionError), clock.watching(calls[2:]):
        engine.step(7)
        _ = 1 / 0
    assert Engine.step is original
    engine.step(100)
    seconds = clock.stop()
    assert (seconds["optimizer"], seconds["shadows"], seconds["forward"], seconds["other"]) == (3, 10, 7, 100)


def test_a_clock_that_does_not_run_touches_nothing(sleep):
    engine, clock = Engine(sleep), PhaseClock(running=False)
    with clock.watching([Watched(engine, "step", "optimizer")]), clock.phase("data"):
        assert "step" not in vars(engine)
        engine.step(3)
    assert clock.stop() == {**dict.fromkeys(PHASES, 0.0), "other": 3.0}
