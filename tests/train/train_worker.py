"""Whole tiny trainings on real ranks: the numbers that tests/train/test_training.py judges.

python -m tests.train.train_worker FOLDER, where FOLDER/shards holds a reach data set
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from recap_ds.checkpoint.on_demand import export_of
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.build import gather
from recap_ds.distributed.engine import destroy_engine
from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import RunStopped
from recap_ds.evaluate.results import evaluate_dataset, open_held_out
from recap_ds.label.job import label_shards, open_label_job
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from recap_ds.processing.normalize import Normalizer
from recap_ds.train import loop
from recap_ds.train.loop import train
from recap_ds.train.session import RunWatch, Session, plan_session, start_session
from recap_ds.train.stopping import STOP_FILE, StopRequests
from tests.distributed.harness import REPOSITORY, worker_main
from tests.tiny import tiny_config

STEPS, SAVE_AT = 6, 3
ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
GLOBAL_BATCH = 8
VLM = {
    "full": {"model": {"freeze_vlm": False}},
    # With dropout, so that an exact resume is seen to hold for what torch itself draws.
    "lora": {"lora": {"enabled": True, "rank": 4, "dropout": 0.1}, "model": {"action_expert_dropout": 0.1}},
    "frozen": {},
}


def run_config(folder: Path, name: str, kind: str = "full", **overrides: Any) -> PiStarRECAPConfig:
    sections: dict[str, Any] = {
        "model": {"conv_stem": True, "max_prompt_tokens": 40, "image_size": 32},
        "training": {
            "batch_size": 2,
            "global_batch_size": GLOBAL_BATCH,
            "num_training_steps": STEPS,
            "num_warmup_steps": 1,
            "learning_rate": 1e-3,
            "use_amp": False,
        },
        "recap": {"advantage_window": 64, "advantage_window_min": 4, "indicator_warmup_steps": 1},
        "data": {"shards": str(folder / "shards"), "num_workers": 0, "held_out_fraction": 0.3},
        "checkpoint": {"save_every_steps": SAVE_AT, "keep_last": 9},
        "logging": {"every_steps": 1, "wandb": "disabled"},
        "evaluation": {"every_steps": SAVE_AT, "max_samples": 12, "batch_size": 4},
    }
    for part in (VLM[kind], overrides):
        for key, value in part.items():
            sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
    return tiny_config(name=name, runs_dir=str(folder / "runs"), chunk_size=10, **sections)


def run_whole(runtime: Runtime, config: PiStarRECAPConfig, ds_path: str = ZERO3) -> dict[str, Any]:
    """Train to the end in this process group; what it logged and where it ended."""
    session = start_session(plan_session(config, ds_path, runtime.info))
    summary = train(session)
    run = session.plan.run
    result = {"summary": summary, "weights": weights(session), "losses": losses(run.metrics)}
    destroy_engine(session.engine)
    return result


def losses(metrics: Path) -> list[list[float]]:
    """Per step: loss and its three parts, grad norm, positive fraction, those there are; what a layout could change."""
    names = [f"train/{name}" for name in ("loss", "policy_loss", "q_loss", "v_loss", "grad_norm", "advantage/mean")]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [[line[name] for name in names if name in line] for line in lines if "train/loss" in line]


def weights(session: Session) -> dict[str, list[float]]:
    """A fingerprint of every parameter that can be compared within a tolerance: four moments in float64."""
    prints = {}
    for name, parameter in session.engine.module.named_parameters():
        with gather([parameter]):
            values = parameter.detach().double().flatten()
            ramp = torch.linspace(-1, 1, len(values), dtype=torch.float64)
            prints[name] = [values.sum().item(), values.square().sum().item(), (values * ramp).sum().item()]
    return prints


def files_hash(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix == ".safetensors"
    }


def initial_differences(runtime: Runtime, config: PiStarRECAPConfig) -> list[str]:
    """Names of parameters and buffers whose initial value is not plain PyTorch's."""
    session = start_session(plan_session(config, ZERO3, runtime.info))
    plain = PiStarRECAPPolicy(config)
    sharded = dict(session.engine.module.named_parameters())
    different = []
    for name, parameter in plain.named_parameters():
        with gather([sharded[name]]):
            if not torch.equal(parameter, sharded[name]):
                different.append(name)
    buffers = dict(session.engine.module.named_buffers())
    different += [name for name, value in plain.named_buffers() if not torch.equal(value, buffers[name])]
    destroy_engine(session.engine)
    return different


def resumed_hashes(runtime: Runtime, config: PiStarRECAPConfig) -> dict[str, Any]:
    """Cut the finished run back to its first checkpoint, continue it, and compare what it ends with."""
    run = Path(config.runs_dir) / config.name
    final = run / "checkpoints" / f"step_{STEPS:08d}"
    before, lines = files_hash(final), losses(run / "metrics.jsonl")
    runtime.barrier()
    if runtime.info.is_main:
        shutil.rmtree(final)
        (run / "summary.json").unlink()
        for link in ("latest", "best"):
            (run / "checkpoints" / link).unlink(missing_ok=True)
    runtime.barrier()
    again = run_whole(runtime, config)
    return {"before": before, "after": files_hash(final), "losses_before": lines, "losses_after": again["losses"]}


class StopAt(StopRequests):
    """Asks one rank, once, so that the run stops after ``step`` steps: what is posted is known a step later."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__()
        self._left = step - 1 if rank == 1 else -1

    def poll(self) -> int:
        self._left -= 1
        return STOP_FILE if self._left == -1 else 0


def stopped_and_continued(runtime: Runtime, config: PiStarRECAPConfig, step: int) -> dict[str, Any]:
    """Stop a run where nothing is due, and go on with it; beside it the run that was not stopped."""
    plan = plan_session(config, ZERO3, runtime.info)
    session = start_session(plan, runtime, RunWatch(StopAt(step, runtime.info.rank)))
    try:
        train(session)
        said = ""
    except RunStopped as stopped:
        said = str(stopped)
        if runtime.info.is_main:
            plan.run.unlock()  # as the end of the process does
    destroy_engine(session.engine)
    between = sorted(path.name for path in plan.run.checkpoints.iterdir())
    runtime.barrier()
    run_whole(runtime, config)
    return {"said": said, "between": between, "after": files_hash(plan.run.checkpoints / f"step_{STEPS:08d}")}


def with_spikes(runtime: Runtime, config: PiStarRECAPConfig, slots: range) -> dict[str, Any]:
    """A run whose guard takes every step within ``slots`` for a spike; it sees the slots of rank 0 as all ranks do."""
    plan = plan_session(config, ZERO3, runtime.info)
    session = start_session(plan, runtime)
    judge, take_step, taken = session.spikes.judge, loop.take_step, []

    def seen(session: Session, step: int, micro_batches: Any, *rest: Any, **named: Any) -> Any:
        first = int(micro_batches[0].slot[0]) // GLOBAL_BATCH * GLOBAL_BATCH
        taken.append([step, first])
        session.spikes.judge = lambda losses: judge(losses)._replace(is_spike=torch.tensor(first in slots))
        return take_step(session, step, micro_batches, *rest, **named)

    loop.take_step = seen
    summary = train(session)
    loop.take_step = take_step
    destroy_engine(session.engine)
    return {
        "taken": taken,
        "summary": summary,
        "losses": losses(plan.run.metrics),
        "bytes": files_hash(plan.run.checkpoints / f"step_{STEPS:08d}"),
        "spikes": [json.loads(line) for line in plan.run.spikes.read_text().splitlines()] if slots else [],
    }


def evaluate_run(runtime: Runtime, run: Path, shards: Path) -> dict[str, Any]:
    """What launch/evaluate.py does with a finished run: export it, load a replica, evaluate over the ranks."""
    policy, contract, tokenizer = load_pretrained(export_of(run, runtime.info))
    assembler, tasks = open_held_out(policy.config, contract, tokenizer, str(shards))
    return evaluate_dataset(policy, assembler, tasks, Normalizer.from_dict(contract.normalizer), runtime)


def critic_to_policy(runtime: Runtime, root: Path) -> dict[str, Any]:
    """RECAP's own order: a distributional critic trains the VLM, labels the shards, and a policy learns."""
    results: dict[str, Any] = {}
    value = {"value": {"critic": "distributional"}, "evaluation": {"gate": "mae"}}
    stages = {
        "critic": run_config(root, "critic", training={"stage": "critic"}, **value),
        "policy": run_config(
            root,
            "policy",
            training={"stage": "policy"},
            data={"labels": "ours"},
            recap={"policy_extraction": "both"},
        ),
    }
    for stage, config in stages.items():
        results[f"initial_{stage}"] = initial_differences(runtime, config)
        results[stage] = run_whole(runtime, config)
        results[f"resumed_{stage}"] = resumed_hashes(runtime, config)
        results[f"evaluation_{stage}"] = evaluate_run(runtime, root / "runs" / stage, root / "shards")
        if stage == "critic":
            export = export_of(root / "runs" / stage, runtime.info)
            job = open_label_job(export, str(root / "shards"), "ours", ["label.lookahead=5"])
            label_shards(job, runtime, lambda line: None)
            runtime.barrier()
    return results


def critic_config(root: Path, which: str, **training: Any) -> PiStarRECAPConfig:
    """Critics alone: by TD, and with a VLM of another architecture (saved by the test), trained and adapted."""
    own = {"critic": "distributional", "backbone": "own", "vlm_model_name": str(root / "llava")}
    # The images and prompts of the shards; an architecture of its own has no stem of ours.
    plain = {"conv_stem": False}
    parts = {
        "iql": {"value": {"critic": "iql"}},
        "own": {"value": own, "model": {"freeze_vlm": False, **plain}},
        "own_lora": {"value": own, "model": {"freeze_vlm": True, **plain}, "lora": {"enabled": True, "rank": 4}},
    }[which]
    training = {"stage": "critic", "activation_checkpointing": which == "own", **training}
    return run_config(root, f"critic_{which}_{training.get('batch_size', 2)}", training=training, **parts)


def critics(runtime: Runtime, root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"iql": run_whole(runtime, critic_config(root, "iql"))}
    for which in ("own", "own_lora"):
        config = critic_config(root, which)
        results[f"initial_{which}"] = initial_differences(runtime, config)
        results[which] = run_whole(runtime, config)
        results[f"evaluation_{which}"] = evaluate_run(runtime, root / "runs" / config.name, root / "shards")
    results["resumed_own"] = resumed_hashes(runtime, critic_config(root, "own"))
    return results


def scenarios(runtime: Runtime, folder: str, which: str) -> dict[str, Any]:
    root = Path(folder)
    world = runtime.info.world
    if which == "layout":  # one rank: the reference that two ranks must equal
        accumulate = {"training": {"batch_size": 8}}
        return {
            "full": run_whole(runtime, run_config(root, f"layout_{world}", **accumulate)),
            "evaluation": evaluate_run(runtime, root / "runs" / "full_2", root / "shards"),
            "iql": run_whole(runtime, critic_config(root, "iql", batch_size=8)),
            "own": run_whole(runtime, critic_config(root, "own", batch_size=8)),
        }
    results: dict[str, Any] = {}
    for kind in VLM:
        config = run_config(root, f"{kind}_{world}", kind)
        results[f"initial_{kind}"] = initial_differences(runtime, config)
        results[kind] = run_whole(runtime, config)
        results[f"resumed_{kind}"] = resumed_hashes(runtime, config)
    results["evaluation"] = evaluate_run(runtime, root / "runs" / f"full_{world}", root / "shards")
    wide = run_config(root, "no_accumulation", training={"batch_size": 4})
    results["no_accumulation"] = run_whole(runtime, wide)
    blind = run_config(root, "no_evaluation", evaluation={"every_steps": 1000})
    results["no_evaluation"] = run_whole(runtime, blind)
    results["evaluated_bytes"] = files_hash(root / "runs" / f"full_{world}" / "checkpoints" / f"step_{STEPS:08d}")
    results["blind_bytes"] = files_hash(root / "runs" / "no_evaluation" / "checkpoints" / f"step_{STEPS:08d}")
    # From a server that loses connections, by way of the cache.
    remote = {"shards": (root / "address").read_text(), "cache_folder": str(root / "cache")}
    results["remote"] = run_whole(runtime, run_config(root, "remote", data=remote))
    results["stopped"] = stopped_and_continued(runtime, run_config(root, "stopped"), step=SAVE_AT + 1)
    guard = {"spike_action": "rollback", "spike_max_in_a_row": 2, "spike_window_steps": 10}
    results["guarded"] = with_spikes(runtime, run_config(root, "guarded", training=guard), range(0))
    # Steps 5 and 6 of a run that saves at 3.
    spiky = run_config(root, "spiky", training=guard)
    results["spiky"] = with_spikes(runtime, spiky, range(4 * GLOBAL_BATCH, 6 * GLOBAL_BATCH))
    ds_bf16 = root / "bf16.json"
    if runtime.info.is_main:
        ds_bf16.write_text(Path(ZERO3).read_text().replace('"enabled": "auto"', '"enabled": true'))
    runtime.barrier()
    bf16 = run_config(root, "bf16", training={"use_amp": True, "activation_checkpointing": True})
    results["bf16"] = run_whole(runtime, bf16, str(ds_bf16))
    stages = critic_to_policy(runtime, root)
    rounded = {"value": {"critic": "distributional"}, "training": {"stage": "critic", "use_amp": True}}
    results["bf16_critic"] = run_whole(runtime, run_config(root, "bf16_critic", **rounded), str(ds_bf16))
    return results | stages | {"critics": critics(runtime, root)}


if __name__ == "__main__":
    worker_main(scenarios)
