"""A policy small enough to train for a few steps in a test, with its engine, shadows and batches.

B batch   C cameras   H chunk   A action dims   S state dims   L prompt tokens   F flow draws
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import Observation, TransitionBatch
from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.distributed.engine import DeepSpeedEngine, build_engine, zero_stale_gradients
from recap_ds.distributed.reduce import sum_over_ranks
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.contract import RobotContract, TaskContract
from tests.distributed.harness import REPOSITORY

H, A, S, L, F, C = 3, 4, 5, 6, 1, 1
GLOBAL_BATCH = 4
MODEL = {
    "vlm_model_name": "tiny",
    "image_size": 32,
    "max_prompt_tokens": L,
    "action_expert_hidden_size": 16,
    "action_expert_num_layers": 1,
    "action_expert_num_heads": 2,
    "qv_hidden_size": 16,
    "qv_num_layers": 1,
    "qv_num_heads": 2,
}
CONTRACT = RobotContract(
    cameras=("front",),
    image_size=32,
    state_dim=S,
    action_dim=A,
    fps=10.0,
    tasks={"reach": TaskContract(prompt="reach the cube", max_length=50)},
    normalizer={"method": "mean_std"},
    manifest_hash="0" * 64,
)


def make_config(kind: str, **model: Any) -> PiStarRECAPConfig:
    """``kind``: frozen, lora or full, of the VLM."""
    return PiStarRECAPConfig(
        chunk_size=H,
        max_action_dim=A,
        max_state_dim=S,
        num_inference_steps=2,
        model={**MODEL, "freeze_vlm": kind != "full", "flow_samples": F, **model},
        lora={"enabled": kind == "lora", "rank": 2, "alpha": 3.0},
        # Rates at which a few steps move every parameter visibly.
        training={"learning_rate": 1e-3, "vlm_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "use_amp": False},
        iql={"target_update_rate": 0.1},
    )


class TinyRun(NamedTuple):
    engine: DeepSpeedEngine
    shadows: dict[str, Shadow]


def start(config: PiStarRECAPConfig, runtime: Runtime, ds_name: str = "zero3") -> TinyRun:
    """An engine at step 0. Collective: every rank must call."""
    world = runtime.info.world
    sizes = BatchSizes(micro=GLOBAL_BATCH // world, accumulation=1, world=world)
    ds, _ = resolve_ds_config(load_ds_config(REPOSITORY / f"ds_configs/{ds_name}.json"), config, sizes, on_cpu=True)
    model = PiStarRECAPPolicy(config, ShardedBuilder(ds, runtime.device))
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
        whole = make_batch(step)
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


def no_scale() -> AdvantageScale:
    infinite = torch.full((1,), torch.inf)
    return AdvantageScale(infinite, infinite, torch.zeros(1, dtype=torch.bool))


def make_observation(generator: torch.Generator) -> Observation:
    B = GLOBAL_BATCH
    return Observation(
        images=torch.randint(0, 255, (B, C, 3, 32, 32), dtype=torch.uint8, generator=generator),
        camera_mask=torch.ones(B, C, dtype=torch.bool),
        tokens=torch.randint(3, 200, (B, L), generator=generator),
        token_mask=torch.ones(B, L, dtype=torch.bool),
        state=torch.randn(B, S, generator=generator),
    )


def make_batch(seed: int) -> TransitionBatch:
    B = GLOBAL_BATCH
    generator = torch.Generator().manual_seed(seed)
    observation, next_observation = make_observation(generator), make_observation(generator)
    true, zero = torch.ones(B, dtype=torch.bool), torch.zeros(B, dtype=torch.long)
    return TransitionBatch(
        observation=observation,
        actions=torch.randn(B, H, A, generator=generator),
        action_valid=torch.ones(B, H, dtype=torch.bool),
        action_dim_mask=torch.ones(B, A, dtype=torch.bool),
        next_observation=next_observation,
        td_valid=true,
        td_action_valid=torch.ones(B, H, dtype=torch.bool),
        chunk_reward=-0.1 * torch.rand(B, generator=generator),
        chunk_discount=torch.full((B,), 0.99),
        continues=torch.ones(B),
        mc_return=-torch.rand(B, generator=generator),
        mc_valid=true,
        task=zero,
        source=torch.arange(B) % 3,
        control=zero,
        steps_to_end=zero,
        outcome=zero,
        sample_valid=true,
        replaced=~true,
        slot=torch.arange(B),
        noise=torch.randn(B, F, H, A, generator=generator),
        time=torch.rand(B, F, generator=generator),
        indicator_dropped=~true,
        augmentation=torch.rand(B, 5, generator=generator),
    )


def rank_slice(nest: Any, runtime: Runtime) -> Any:
    """This rank's samples of a batch."""
    if isinstance(nest, Tensor):
        return nest.chunk(runtime.info.world)[runtime.info.rank]
    return type(nest)(*(rank_slice(part, runtime) for part in nest))
