"""Evaluate an export or a checkpoint on shards, spread over ranks, and write evaluation_results.json.

No engine: every rank holds a plain replica and takes its share of the batches. The figures do not depend on how many
ranks there are, nor on evaluation.batch_size.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.algo.returns import value_scale
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler
from recap_ds.data.baseline import mean_actions
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.data.sample import check_data_matches
from recap_ds.data.shard_set import ShardSet
from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import UsageError
from recap_ds.evaluate.offline import summarise
from recap_ds.evaluate.records import collect_records
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import Tokenizer

RESULTS_NAME = "evaluation_results.json"


def open_held_out(
    config: PiStarRECAPConfig, contract: RobotContract, tokenizer: Tokenizer, shards: str
) -> tuple[Assembler, list[str]]:
    """The shards, read as the policy was trained: its cameras, normalisation and L_task.

    Returns what reads them and their tasks. UsageError where they do not fit.
    """
    shard_set = ShardSet.open(shards, config.data)
    manifest = shard_set.manifest
    # The slots are those of training, whatever order or further cameras these shards have.
    if config.data.camera_slots is None:
        data = config.data.model_copy(update={"cameras": contract.cameras})
        config = config.model_copy(update={"data": data})
    check_data_matches(config, manifest)
    for name, there, trained in (
        ("state_dim", manifest.state_dim, contract.state_dim),
        ("action_dim", manifest.action_dim, contract.action_dim),
    ):
        if there != trained:
            raise UsageError(f"--shards {shards}: their {name} is {there}, the policy was trained on {trained}")
    unknown = [name for name in manifest.tasks if name not in contract.tasks]
    if unknown:
        raise UsageError(f"--shards {shards}: task '{unknown[0]}' is not one the policy was trained on")
    tasks = list(manifest.tasks)
    # The contract's lengths hold the overrides already, and may be of more tasks than these shards have.
    value = config.value.model_copy(update={"max_length": {}})
    scale = value_scale(value, {name: contract.tasks[name].max_length for name in tasks}, tasks)
    normalizer = Normalizer.from_dict(contract.normalizer)
    return Assembler(shard_set, config, tokenizer, normalizer, scale), tasks


def evaluate_dataset(
    policy: PiStarRECAPPolicy, assembler: Assembler, tasks: list[str], normalizer: Normalizer, runtime: Runtime
) -> dict[str, Any]:
    """``dataset_evaluation`` over the held-out samples. Collective: every rank must call."""
    config, device = policy.config, runtime.device
    if set(config.heads) - dict(policy.named_children()).keys():
        raise UsageError("--checkpoint: this export was made without critics, and evaluation needs them")
    batches = EvaluationBatches(assembler, config, rank=runtime.info.rank, world=runtime.info.world)
    if not len(batches):
        raise UsageError("data.held_out_fraction: no held-out samples in these shards; use a larger fraction")
    scale = AdvantageScale(*(torch.zeros(len(tasks), device=device) for _ in range(3)))
    unused = normalizers(torch.ones(len(LossNormalizers._fields), device=device))

    def forward(batch: TransitionBatch) -> EvaluationOutput:
        return policy(batch, "evaluate", scale, unused, False)

    constant = None
    if "action_expert" in config.heads:
        constant = mean_actions(assembler.shard_set, config.data.held_out_fraction, config.training.seed)
    return summarise(collect_records(forward, batches, device), config, tasks, normalizer, constant)


def check_writable(path: Path) -> None:
    """UsageError where results could not be written: said before the evaluation, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror})") from None


def write_results(
    path: Path,
    checkpoint: str,
    shards: str | None,
    evaluation: dict[str, Any] | None,
    rollouts: dict[str, Any] | None = None,
) -> None:
    """``evaluation`` and ``rollouts``: None where the call was not asked for that part."""
    results = {"checkpoint": checkpoint, "dataset_path": shards, "dataset_evaluation": _finite_or_none(evaluation)}
    if rollouts is not None:
        results["rollouts"] = _finite_or_none(rollouts)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: _finite_or_none(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_table(evaluation: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{evaluation['num_samples']} held-out samples"]
    losses = {name: evaluation[name] for name in ("policy_loss", "q_loss", "v_loss") if evaluation[name] is not None}
    lines.append("  ".join(f"{name} {_number(value)}" for name, value in losses.items()))
    for group, figures in (evaluation["actions"] or {}).items():
        lines.append(
            f"action error  {group:<16} {figures['error']:.4f}, task's mean action {figures['constant_error']:.4f}, "
            f"ratio {_number(figures['ratio'])}  ({figures['num_samples']} samples)"
        )
    value = evaluation["value"]
    for name, figures in ({"all tasks": value["all"], **value["tasks"]} if value is not None else {}).items():
        nll = "" if figures["nll"] is None else f"  nll {_number(figures['nll'])}"
        lines.append(
            f"value  {name:<24} mae {_number(figures['mae'])} (constant {_number(figures['constant_mae'])})  "
            f"rank correlation {_number(figures['rank_correlation'])}  separation {_number(figures['separation'])}  "
            f"shuffled-image gap {_number(figures['shuffled_image_gap'])}{nll}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
