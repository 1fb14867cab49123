"""The joint expert under ZeRO-3, adapters on the VLM, everything recomputed in backward."""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from recap_ds.batch import TransitionBatch
from recap_ds.distributed.engine import build_engine, destroy_engine, zero_stale_gradients
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.distributed import tiny
from tests.distributed.harness import worker_main
from tests.models.tiny_policy import READY, gradients, rows, train
from tests.tiny import random_batch, tiny_config, wake


def compare(
    ds: dict[str, Any], runtime: Runtime, version: str, told: str, insulated: bool, tokens: bool = False
) -> dict[str, Any]:
    """Gradients of two ranks with half of a batch each, and of a plain module with all of it."""
    config = tiny_config(
        model={
            "action_expert": "pi_joint",
            "action_expert_num_heads": 4,
            "pi_version": version,
            "advantage_conditioning": told,
            "stop_gradient": insulated,
            "action_token_weight": float(tokens),
            "max_action_tokens": 8,
        },
        data={"normalization": "quantile"},
        lora={"enabled": True, "rank": 2},
        training={"activation_checkpointing": True},
    )
    dense, batch = PiStarRECAPPolicy(config), random_batch(config, 8, seed=0)
    wake(dense)
    builder = ShardedBuilder(ds, runtime.device)
    policy = PiStarRECAPPolicy(config, builder)
    named = dict(dense.named_parameters())
    for name, parameter in policy.named_parameters():
        builder.write(parameter, named[name].detach())
    groups = [{**group, "lr": 0.0} for group in policy.parameter_groups()]
    engine = build_engine(policy, groups, ds)

    def sharded(whole: TransitionBatch) -> dict[str, torch.Tensor]:
        world, rank = runtime.info.world, runtime.info.rank
        part = rows(whole, slice(8 // world * rank, 8 // world * (rank + 1)))
        counts = normalizers(local_counts(whole) / world)
        engine.backward(engine(part, "train", READY, counts, False).loss)
        found = {name: safe_get_full_grad(p).clone() for name, p in policy.named_parameters() if p.requires_grad}
        engine.step()
        zero_stale_gradients(engine)
        return found

    sharded(batch)  # the first step records ZeRO-3's trace, the second follows it
    ours, theirs = sharded(batch), gradients(dense, train(dense, batch).loss)
    no_targets = sharded(batch._replace(td_valid=torch.zeros_like(batch.td_valid)))
    result = {
        "same_parameters": ours.keys() == theirs.keys(),
        "largest_difference": max((ours[name] - theirs[name]).abs().max().item() for name in theirs),
        "largest_gradient": max(gradient.abs().max().item() for gradient in theirs.values()),
        "vlm": max(ours[name].abs().max().item() for name in ours if name.startswith("vlm.")),
        "vlm_from_actions": max(no_targets[name].abs().max().item() for name in ours if name.startswith("vlm.")),
        "expert_from_actions": max(no_targets[n].abs().max().item() for n in ours if n.startswith("action_expert.")),
    }
    destroy_engine(engine)
    return result


def scenarios(runtime: Runtime) -> dict[str, Any]:
    ds = tiny.ds_config("zero3", runtime.info.world)
    cases = {
        "pi05 text": ("pi05", "text", False),
        "pi05 insulated": ("pi05", "embedding", True),
        "pi05 tokens": ("pi05", "text", True, True),
        "pi0": ("pi0", "embedding", False),
    }
    return {name: compare(ds, runtime, *case) for name, case in cases.items()}


if __name__ == "__main__":
    worker_main(scenarios)
