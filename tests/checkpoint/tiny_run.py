"""A tiny policy with its engine and shadows, trained for a few steps: what the tests of checkpoints save and resume."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.checkpoint import layout
from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.distributed.engine import DeepSpeedEngine, build_engine, zero_stale_gradients
from recap_ds.distributed.reduce import sum_over_ranks
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.recipe import dump_config
from tests.checkpoint.hand_made import CONTRACT, make_config
from tests.distributed.harness import REPOSITORY
from tests.tiny import random_batch

GLOBAL_BATCH = 4


class TinyRun(NamedTuple):
    engine: DeepSpeedEngine
    shadows: dict[str, Shadow]


def start(
    config: PiStarRECAPConfig,
    runtime: Runtime,
    ds_name: str = "zero3",
    vlm_folder: str | None = None,
    bf16: bool = False,
) -> TinyRun:
    """An engine at step 0. Collective: every rank must call."""
    world = runtime.info.world
    sizes = BatchSizes(micro=GLOBAL_BATCH // world, accumulation=1, world=world)
    raw = load_ds_config(REPOSITORY / f"ds_configs/{ds_name}.json")
    raw["bf16"] = {"enabled": bf16}
    config = config.model_copy(update={"training": config.training.model_copy(update={"use_amp": bf16})})
    ds, _ = resolve_ds_config(raw, config, sizes, on_cpu=True)
    model = PiStarRECAPPolicy(config, ShardedBuilder(ds, runtime.device), vlm_folder)
    engine = build_engine(model, model.parameter_groups(), ds)
    params = dict(engine.module.named_parameters())
    online = {name: param for name, param in params.items() if name.startswith("critic.q.")}
    targets = {name: params[name.replace("critic.q.", "target_critic.")] for name in online}
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    return TinyRun(engine, {"target": Shadow(online, targets), "ema": Shadow(trainable)})


def train(run: TinyRun, steps: range, runtime: Runtime) -> list[float]:
    """Losses of the global batch at ``steps``. Collective: every rank must call."""
    losses = []
    world = runtime.info.world
    run.engine.train()
    for step in steps:
        whole = random_batch(run.engine.module.config, GLOBAL_BATCH, seed=step, num_tasks=1)
        # The engine averages over ranks, so every rank divides by the mean count.
        counts = normalizers(local_counts(whole) / world)
        output = run.engine(rank_slice(whole, runtime), "train", no_scale(), counts, False)
        losses.append(float(sum_over_ranks(output.loss.detach())) / world)
        run.engine.backward(output.loss)
        run.engine.step()
        zero_stale_gradients(run.engine)
        run.shadows["target"].lerp(0.1)
        run.shadows["ema"].lerp(0.2)
    return losses


def evaluate_actions(run: TinyRun, seed: int) -> Tensor:
    """[B, H, A] actions of the same batch on every rank. Collective: every rank must call."""
    batch = random_batch(run.engine.module.config, GLOBAL_BATCH, seed=seed, num_tasks=1)
    run.engine.eval()
    return run.engine(batch, "evaluate", no_scale(), normalizers(local_counts(batch)), False).actions


def no_scale() -> AdvantageScale:
    infinite = torch.full((1,), torch.inf)
    return AdvantageScale(infinite, infinite, torch.zeros(1, dtype=torch.bool))


def rank_slice(nest: Any, runtime: Runtime) -> Any:
    """This rank's samples of a batch."""
    if isinstance(nest, Tensor):
        return nest.chunk(runtime.info.world)[runtime.info.rank]
    return type(nest)(*(rank_slice(part, runtime) for part in nest))


def start_folder(run: Path, kind: str) -> None:
    """What the training loop writes at the start; rank 0 only."""
    (run / layout.CHECKPOINTS_NAME).mkdir(parents=True)
    (run / layout.CONFIG_NAME).write_text(dump_config(make_config(kind)))
    CONTRACT.save(run)
