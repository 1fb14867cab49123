"""Environments in processes of their own."""

import os
import signal
from multiprocessing import Pipe

import numpy as np
import pytest

from recap_ds.config import CollectConfig, EnvConfig
from recap_ds.errors import RunFailed, UsageError
from recap_ds.rollout.episode import EpisodePlan, Look, PlayRules
from recap_ds.rollout.workers import Workers, WorldSettings, _Failure, _say_last

CART = "tests.envs.fake_world:Cart"
RULES = PlayRules(CollectConfig(), seed=0)


def settings(name="reach", **env):
    return WorldSettings(name, EnvConfig(**env), None, 32)


def play_to_the_end(workers, worker, plan, action):
    workers.begin(worker, plan)
    while isinstance(answer := workers.receive([worker])[worker], Look):
        workers.play(worker, action, None)
    return answer


def test_episodes_of_a_process_are_those_of_any_other_and_a_crash_is_said():
    plan = EpisodePlan(0, seed=5, task="reach_red", prompt="go")
    with Workers(settings(), RULES, 2) as workers:
        assert len(workers) == 2
        played = [play_to_the_end(workers, worker, plan, np.array([[0.5, -0.5]] * 3)) for worker in (0, 1)]
        np.testing.assert_array_equal(played[0].states, played[1].states)
        assert played[0].num_frames == 40 and played[0].plan == plan
        os.kill(workers._processes[1].pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"--env reach: an environment process died \(exit code -9\)"):
            play_to_the_end(workers, 1, plan, np.zeros((1, 2)))
        processes = workers._processes
    assert not any(process.is_alive() for process in processes)


def test_what_goes_wrong_in_a_process_is_raised_here(capfd):
    found = {"state_key": "agent/place", "cameras": {"front": "eye"}}
    with Workers(settings(CART, **found, success_key="won"), RULES, 1) as workers:
        workers.begin(0, EpisodePlan(0, 0, CART, "go"))
        assert isinstance(workers.receive([0])[0], Look)
        workers.play(0, np.zeros((1, 1)), None)
        with pytest.raises(UsageError, match=r"env\.success_key"):
            workers.receive([0])
    with Workers(settings(CART, **found, options={"breaks": True}), RULES, 1) as workers:
        workers.begin(0, EpisodePlan(0, 0, CART, "go"))
        workers.receive([0])
        workers.play(0, np.zeros((1, 1)), None)
        with pytest.raises(RunFailed, match=f"--env {CART}: ZeroDivisionError: a simulator's own fault"):
            workers.receive([0])
    assert "Traceback" in capfd.readouterr().err  # of the simulator, for whoever wrote it


def test_a_process_that_fails_after_another_was_heard_adds_no_traceback():
    heard, failing = Pipe()
    heard.close()
    _say_last(failing, _Failure("env.success_key: no such key", is_usage=True))
