"""One rank of ``recap-ds bench step``: ``python -m recap_ds.bench.step_rank FOLDER DS_CONFIG REPEATS``.

Trains the recipes of FOLDER in turns, one step each, forwards and then backwards: whatever else the machine does falls
on all of them alike. Rank 0 writes FOLDER/result.json.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.nn import functional

from recap_ds.bench.phases import PhaseClock
from recap_ds.bench.trainers import EngineTrainer, PlainTrainer
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.build import whole_numel
from recap_ds.distributed.runtime import RankInfo, Runtime, read_rank_info, start_runtime, stop_runtime, wait_for_device
from recap_ds.recipe import load_config
from recap_ds.train.session import Session, plan_session, start_session

RESULT_NAME = "result.json"
# Three: DeepSpeed records the order of modules in the first step and prefetches by it from the third on.
WARM_UP_STEPS = 3


class Contestant(NamedTuple):
    trainer: EngineTrainer | PlainTrainer
    everywhere: bool  # False = rank 0 alone works, the others wait


class Taken(NamedTuple):
    """Of one step; JSON."""

    seconds: float  # without data
    host_seconds: float  # of the rank's processors, whatever else they were given to: threads of collectives included
    phases: dict[str, float]  # seconds, with data; empty where nobody watched


def main(folder: Path, ds_path: str, num_repeats: int) -> None:
    info = read_rank_info()
    runtime = start_runtime(info)
    contestants, facts = build(recipes_of(folder), ds_path, info, runtime)
    taken = {name: [] for name in contestants}
    for number in range(-WARM_UP_STEPS, 2 * num_repeats):
        # Every other round is watched: on an accelerator a watched step is a slower one.
        for name in in_turn(list(contestants), number):
            step = take(contestants[name], runtime, watched=number % 2 == 1)
            if number >= 0:
                taken[name].append(step)
    every_rank = runtime.gather_objects(taken)
    if info.is_main:
        (folder / RESULT_NAME).write_text(json.dumps({**facts, "taken": every_rank}))
    runtime.barrier()
    stop_runtime()


def recipes_of(folder: Path) -> dict[str, PiStarRECAPConfig]:
    return {path.stem: load_config(path) for path in sorted(folder.glob("*.yaml"))}


def in_turn(names: list[str], number: int) -> Iterator[str]:
    """Pairs of rounds in the same order, so that watched and unwatched ones see both."""
    return iter(names) if number % 4 < 2 else reversed(names)


def build(
    recipes: dict[str, PiStarRECAPConfig], ds_path: str, info: RankInfo, runtime: Runtime
) -> tuple[dict[str, Contestant], dict]:
    """Collective: every rank must call."""
    plain_linear = functional.linear
    plans = {name: plan_session(config, ds_path, info) for name, config in recipes.items()}
    sessions = {name: start_session(plan) for name, plan in plans.items()}
    engine_linear, functional.linear = functional.linear, plain_linear
    contestants = {name: Contestant(EngineTrainer(each, engine_linear), True) for name, each in sessions.items()}
    own = PlainTrainer(plans["engine"], runtime, shared=False)
    contestants |= {
        "ddp": Contestant(PlainTrainer(plans["engine"], runtime, shared=True), True),
        "apart": Contestant(own, True),
        "alone": Contestant(own, False),
    }
    return contestants, facts_of(sessions["engine"])


def facts_of(session: Session) -> dict:
    parameters = list(session.engine.module.parameters())
    plan = session.plan
    return {
        "device": str(session.runtime.device),
        "precision": plan.precision.text,
        "zero_stage": plan.ds_config["zero_optimization"]["stage"],
        "parameters": sum(whole_numel(each) for each in parameters),
        "trainable_parameters": sum(whole_numel(each) for each in parameters if each.requires_grad),
        "micro_batch": plan.sizes.micro,
        "accumulation": plan.sizes.accumulation,
    }


def take(contestant: Contestant, runtime: Runtime, watched: bool) -> Taken:
    """Collective: every rank must call."""
    runtime.barrier()
    if not (contestant.everywhere or runtime.info.is_main):
        return Taken(0.0, 0.0, {})
    clock = PhaseClock(running=watched)
    with clock.phase("data"):
        batches = next(contestant.trainer.batches)
    if contestant.everywhere:
        runtime.barrier()  # data is not what is measured: its slowest rank would make all the others' steps long
    wait_for_device()
    began, host_began = time.perf_counter(), time.process_time()
    contestant.trainer.step(batches, clock)
    wait_for_device()
    seconds, host_seconds = time.perf_counter() - began, time.process_time() - host_began
    return Taken(seconds, host_seconds, clock.stop() if watched else {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
