"""``recap-ds bench step``: what the engine costs a training step, and what the critics cost it.

Real training steps of a recipe on a few ranks of this machine, in turns in the same processes: stage joint under the
engine of a DeepSpeed configuration (``engine``), under torch's DDP (``ddp``), on every rank at once without a word
between them (``apart``: what DDP and engine would reach if communication were free), on one rank (``alone``); and with
a frozen VLM under the engine, stage joint and stage policy. Every ratio is the median of ratios within one round.
DDP waits for its peers within the backward, in C++: its communication is not seen as such.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from recap_ds.bench.made_policy import Expert
from recap_ds.bench.phases import PHASES
from recap_ds.bench.step_rank import RESULT_NAME, Taken
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.runtime import RankInfo
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.errors import RunFailed, UsageError
from recap_ds.recipe import dump_config, load_config
from recap_ds.train.session import plan_session

# Without --config. Half a second of one core a step, half as much again for the engine's hooks, which cost the same
# whatever the batch: a larger training.batch_size is closer to a model of billions.
RECIPE = (
    "max_action_dim=4",
    "max_state_dim=8",
    "model.vlm_model_name=tiny",
    "model.freeze_vlm=false",
    "model.image_size=96",
    "model.max_prompt_tokens=40",
    "model.action_expert_hidden_size=128",
    "model.action_expert_num_layers=4",
    "model.action_expert_num_heads=4",
    "model.flow_samples=4",
    "model.qv_hidden_size=128",
    "model.qv_num_layers=2",
    "model.qv_num_heads=4",
    "training.batch_size=32",
)
# With --expert pi_joint: as many layers as the tiny VLM, the advantage in words.
PI_JOINT = ("model.action_expert=pi_joint", "model.action_expert_num_layers=2", "model.advantage_conditioning=text")
# What a measurement needs and a recipe has no say in.
FIXED = (
    "data.num_workers=0",
    "data.labels=null",
    "training.num_training_steps=100000",
    "training.num_warmup_steps=100",
    "training.start_from=null",
)
FROZEN = (
    "model.freeze_vlm=true",
    "lora.enabled=false",
    "model.stop_gradient=false",
    "model.action_token_weight=0",
)
ENGINE, JOINT, POLICY = "engine", "joint_frozen", "policy_frozen"
SHARDS_NAME = "shards"


def small_recipe(recipe: Path | None, expert: Expert | None) -> Sequence[str]:
    """Settings that stand in for a recipe that was not given."""
    if recipe is None:
        return (*RECIPE, *PI_JOINT) if expert == "pi_joint" else RECIPE
    if expert is not None:
        raise UsageError(f"--expert {expert}: {recipe} has one of its own, model.action_expert; leave it out")
    return ()


def bench_step(
    recipe: Path | None,
    overrides: Sequence[str],
    ds_path: str,
    num_ranks: int,
    num_repeats: int,
    expert: Expert | None = None,
) -> dict[str, Any]:
    """Figures as JSON; ``expert``: of the small recipe.

    UsageError where the recipe or the DeepSpeed configuration cannot be trained.
    """
    with tempfile.TemporaryDirectory(prefix="recap_ds_bench_") as temporary:
        folder = Path(temporary)
        for name, config in configurations(folder, recipe, [*small_recipe(recipe, expert), *overrides]).items():
            plan_session(config, ds_path, RankInfo(world=num_ranks, local_world=num_ranks))  # refuses what is wrong
            (folder / f"{name}.yaml").write_text(dump_config(config), encoding="utf-8")
        command = [sys.executable, "-m", "recap_ds.bench.step_rank", str(folder), ds_path, str(num_repeats)]
        run_ranks(command, folder, num_ranks)
        result = json.loads((folder / RESULT_NAME).read_text())
    return figures(result, num_ranks, num_repeats)


def configurations(folder: Path, recipe: Path | None, overrides: Sequence[str]) -> dict[str, PiStarRECAPConfig]:
    """By the names of their trainers. Without shards, some of the built-in task are made in ``folder``."""
    settings = [*overrides, *FIXED]
    given = load_config(recipe, settings)
    if given.data.shards is None:
        made = folder / SHARDS_NAME
        size = given.model.image_size
        write_reach_shards(made, num_demo=4, num_auto=4, num_intervention=2, chunk_size=given.chunk_size, size=size)
        settings.append(f"data.shards={made}")
    settings.append(f"runs_dir={folder / 'runs'}")
    kinds = {
        ENGINE: ("training.stage=joint", "recap.sft=false"),
        JOINT: ("training.stage=joint", "recap.sft=false", *FROZEN),
        POLICY: ("training.stage=policy", "recap.sft=true", "recap.policy_extraction=conditioned", *FROZEN),
    }
    return {name: load_config(recipe, [*settings, f"name={name}", *kind]) for name, kind in kinds.items()}


def run_ranks(command: list[str], folder: Path, num_ranks: int) -> None:
    """RunFailed with the last line that a rank that failed has said."""
    port = free_port()
    ranks = [start_rank(command, folder, rank, num_ranks, port) for rank in range(num_ranks)]
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            if any(codes) or None not in codes:
                break
            time.sleep(0.1)
        failed = [number for number, rank in enumerate(ranks) if rank.returncode]
    finally:
        for rank in ranks:  # they would wait for the one that failed
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    if failed:
        said = log_of(folder, failed[0]).read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
        raise RunFailed(f"bench step: rank {failed[0]} of {num_ranks} failed: {said.splitlines()[-1]}")


def start_rank(command: list[str], folder: Path, rank: int, world: int, port: int) -> subprocess.Popen:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with log_of(folder, rank).open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def figures(result: dict[str, Any], num_ranks: int, num_repeats: int) -> dict[str, Any]:
    taken = {name: by_round(result["taken"], name) for name in result["taken"][0]}
    seconds = {name: [max(each.seconds for each in ranks) for ranks in rounds[0::2]] for name, rounds in taken.items()}
    samples = result["micro_batch"] * result["accumulation"]
    host = {name: [max(each.host_seconds for each in ranks) for ranks in rounds] for name, rounds in taken.items()}
    speed = {name: samples * (1 if name == "alone" else num_ranks) / median(each) for name, each in seconds.items()}

    def ratio(of: dict[str, list[float]], name: str, over: str) -> float:
        return round(median(a / b for a, b in zip(of[name], of[over], strict=True)), 3)

    facts = {name: value for name, value in result.items() if name != "taken"}
    return {
        "bench": "step",
        **facts,
        "ranks": num_ranks,
        "repeats": num_repeats,
        "step_seconds": {name: round(median(each), 4) for name, each in seconds.items()},
        "host_seconds": {name: round(median(each), 4) for name, each in host.items()},
        "samples_per_second": {name: round(each, 2) for name, each in speed.items()},
        # Of samples per second; the share of a step without communication that engine and DDP keep.
        "engine_over_ddp": ratio(seconds, "ddp", ENGINE),
        "engine_over_apart": ratio(seconds, "apart", ENGINE),
        "ddp_over_apart": ratio(seconds, "apart", "ddp"),
        # Of seconds: what critics and next observations cost a step with a frozen VLM.
        "joint_over_policy_seconds": ratio(seconds, JOINT, POLICY),
        # The same two of processor time, which other jobs on a busy machine do not lengthen.
        "engine_over_ddp_host": ratio(host, "ddp", ENGINE),
        "joint_over_policy_host": ratio(host, JOINT, POLICY),
        "phase_shares": {name: shares(rounds[1::2]) for name, rounds in taken.items()},
    }


def by_round(every_rank: list[dict[str, list]], name: str) -> list[list[Taken]]:
    """[round][rank], of the ranks that worked."""
    rounds = zip(*(rank[name] for rank in every_rank), strict=True)
    return [[Taken(*each) for each in ranks if each[0] > 0] for ranks in rounds]


def shares(rounds: list[list[Taken]]) -> dict[str, float]:
    """Of the watched steps' whole time, data included: the median over rounds of rank 0's."""
    parts = [{name: ranks[0].phases[name] / sum(ranks[0].phases.values()) for name in PHASES} for ranks in rounds]
    return {name: round(median(each[name] for each in parts), 3) for name in PHASES}


def table(figure: dict[str, Any]) -> list[str]:
    """For people: a line per trainer."""
    lines = [f"{'':14}{'s/step':>9}{'host s':>9}{'samples/s':>11}" + "".join(f"{name:>14}" for name in PHASES)]
    for name, seconds in figure["step_seconds"].items():
        parts = "".join(f"{figure['phase_shares'][name][phase]:>14.1%}" for phase in PHASES)
        host, speed = figure["host_seconds"][name], figure["samples_per_second"][name]
        lines.append(f"{name:14}{seconds:>9.4f}{host:>9.4f}{speed:>11.2f}{parts}")
    lines.append(
        f"samples/s: engine {figure['engine_over_ddp']:.2f} x DDP and {figure['engine_over_apart']:.2f} x apart; "
        f"seconds with a frozen VLM: joint {figure['joint_over_policy_seconds']:.2f} x policy; of processor time "
        f"{figure['engine_over_ddp_host']:.2f}, {figure['joint_over_policy_host']:.2f}"
    )
    return lines
