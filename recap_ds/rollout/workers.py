"""Environments in processes of their own: each plays one episode at a time while the policy serves the others.

Processes are spawned, not forked: a renderer does not survive a fork. They import no torch. A process that ends by
itself (a driver that crashes) is a RunFailed here; what the user gave wrongly is the UsageError that it was there.
"""

import os
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy as np

from recap_ds.config import EnvConfig, EvaluationConfig
from recap_ds.envs.build import open_environment
from recap_ds.envs.interface import Environment
from recap_ds.errors import RunFailed, UsageError
from recap_ds.rollout.corrector import Corrector, ScriptedCorrector
from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode, PlayRules
from recap_ds.rollout.keyboard import KeyboardCorrector, PersonLeft
from recap_ds.rollout.player import Player

CLOSE_SECONDS = 5.0


class WorldSettings(NamedTuple):
    """What a process needs to build its environment."""

    name: str
    env: EnvConfig
    cameras: tuple[str, ...] | None
    image_size: int | None


class _Failure(NamedTuple):
    """What went wrong in a process: the message, and whether it was meant for the user."""

    message: str
    is_usage: bool


class _Left(NamedTuple):
    """The person who corrects closed the window."""


class Workers:
    """A context manager over ``num_workers`` environments, addressed by number."""

    def __init__(self, settings: WorldSettings, rules: PlayRules, num_workers: int) -> None:
        context = get_context("spawn")
        self._name = settings.name
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, settings, rules), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # a process that waits for work ends by itself
        for process in self._processes:
            process.join(CLOSE_SECONDS)
            if process.is_alive():
                process.terminate()
                process.join()

    def __len__(self) -> int:
        return len(self._pipes)

    def begin(self, worker: int, plan: EpisodePlan) -> None:
        self._send(worker, ("begin", (plan,)))

    def play(self, worker: int, actions: np.ndarray, value: float | None) -> None:
        self._send(worker, ("play", (actions, value)))

    def receive(self, busy: Sequence[int]) -> dict[int, Look | PlayedEpisode]:
        """The answers of at least one of the ``busy`` workers; waits for the first. PersonLeft ends all of them."""
        worker_of = {id(self._pipes[worker]): worker for worker in busy}
        ready = wait([self._pipes[worker] for worker in busy])
        return {worker_of[id(pipe)]: self._read(worker_of[id(pipe)]) for pipe in ready}

    def _send(self, worker: int, command: tuple) -> None:
        try:
            self._pipes[worker].send(command)
        except OSError:
            self._read(worker)  # it said why before it ended, or it did not
            raise

    def _read(self, worker: int) -> Look | PlayedEpisode:
        try:
            answer = self._pipes[worker].recv()
        except (EOFError, OSError):
            self._processes[worker].join(CLOSE_SECONDS)
            code = self._processes[worker].exitcode
            raise RunFailed(
                f"--env {self._name}: an environment process died (exit code {code}); its own words are above"
            ) from None
        if isinstance(answer, _Left):
            raise PersonLeft
        if isinstance(answer, _Failure):
            raise (UsageError if answer.is_usage else RunFailed)(answer.message)
        return answer


def count_workers(evaluation: EvaluationConfig, local_world: int) -> int:
    """Environment processes of this rank: more than the batch has rows would wait for ever."""
    cores = len(os.sched_getaffinity(0)) // local_world
    return min(evaluation.num_envs or max(1, cores), evaluation.rollout_batch_size)


def _serve(pipe: Connection, settings: WorldSettings, rules: PlayRules) -> None:
    """In the process: build the environment, then answer until the pipe closes."""
    # Ctrl-C goes to the whole group: the parent decides what becomes of running episodes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        env = open_environment(settings.name, settings.env, settings.cameras, settings.image_size)
        corrector = _open_corrector(env, rules)
        player = Player(env, rules, corrector)
        while True:
            name, arguments = pipe.recv()
            pipe.send(player.begin(*arguments) if name == "begin" else player.play(*arguments))
    except EOFError:
        corrector.close()
        env.close()
    except BrokenPipeError:
        return
    except PersonLeft:
        _say_last(pipe, _Left())
    except UsageError as error:
        _say_last(pipe, _Failure(str(error), is_usage=True))
    # Whatever a simulator throws: the parent reports it, and the traceback is for whoever wrote the simulator.
    except Exception as error:
        traceback.print_exc()
        _say_last(pipe, _Failure(f"--env {settings.name}: {type(error).__name__}: {error}", is_usage=False))


def _say_last(pipe: Connection, words: _Left | _Failure) -> None:
    with suppress(BrokenPipeError):  # another process of this rank was heard first, or the parent has ended
        pipe.send(words)


def _open_corrector(env: Environment, rules: PlayRules) -> Corrector:
    if rules.corrector == "script":
        return ScriptedCorrector(env, rules.collect)
    from recap_ds.rollout.window import PygameWindow

    return KeyboardCorrector(env, PygameWindow(f"recap-ds collect: {env.spec.name}", env.spec.fps))
