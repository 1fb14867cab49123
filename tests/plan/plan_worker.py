"""Engines of every shipped kind around a tiny policy: the bytes they really hold, for tests/plan/test_footprint.py."""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.engine import build_engine, destroy_engine, flat_masters, zero_stage, zero_stale_gradients
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.train.session import build_shadows
from tests.distributed.harness import worker_main
from tests.plan.engines import ENGINES, resolved, worker_config
from tests.tiny import random_batch

STEPS = 3  # the first two record the order of modules, by which the third prefetches


def measure(runtime: Runtime, name: str) -> dict[str, int]:
    config = worker_config()
    ds_config = resolved(name, config, runtime.info.world)
    policy = PiStarRECAPPolicy(config, ShardedBuilder(ds_config, runtime.device))
    engine = build_engine(policy, policy.parameter_groups(), ds_config)
    shadows = build_shadows(policy, config)
    gathered: list[int] = []
    for step in range(STEPS):
        with_watch = step == STEPS - 1 and zero_stage(engine) == 3
        backward(engine, config, runtime.info.rank, gathered if with_watch else None)
        found = held(engine) if step == STEPS - 1 else {}
        engine.step()
        zero_stale_gradients(engine)
    found |= after_step(engine)
    found["averages"] = storage_bytes(value for shadow in shadows.values() for _, value in shadow.tiles())
    found["gathered_elements"] = max(gathered, default=0)
    destroy_engine(engine)
    return found


def backward(engine: Any, config: PiStarRECAPConfig, rank: int, gathered: list[int] | None) -> None:
    batch = random_batch(config, config.training.batch_size, seed=rank)
    scale = AdvantageScale(torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def watched(coordinator: Any, *args: Any, **kwargs: Any) -> None:
        fetch(coordinator, *args, **kwargs)
        here = (p for p in engine.module.parameters() if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE)
        gathered.append(sum(p.ds_numel for p in here if not p.ds_persist))

    if gathered is not None:
        PartitionedParameterCoordinator.fetch_sub_module = watched
    try:
        output = engine(batch, "train", scale, normalizers(local_counts(batch)), False)
        engine.backward(output.loss)
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = fetch


def held(engine: Any) -> dict[str, int]:
    """Between backward and step, when gradients are there under every stage."""
    params, optimizer = list(engine.module.parameters()), engine.optimizer
    if zero_stage(engine) == 2:
        gradients = [part for parts in optimizer.averaged_gradients.values() if parts for part in parts]
        found = {"weights": storage_bytes(params), "gradients": storage_bytes(gradients)}
        return {**found, "secondary": 0, "persistent": 0, "standing_bucket": 0}
    small = [p for p in params if p.ds_persist and p.ds_status is ZeroParamStatus.AVAILABLE]
    return {
        "weights": storage_bytes(p.ds_tensor for p in params),
        "gradients": storage_bytes([optimizer.grad_partitions_flat_buffer]),
        "secondary": storage_bytes(p.ds_secondary_tensor for p in params if p.ds_secondary_tensor is not None),
        "persistent": storage_bytes(small),
        "standing_bucket": storage_bytes(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
        "master_gradients": storage_bytes(flat.grad for flat in flat_masters(engine) if flat.grad is not None),
    }


def after_step(engine: Any) -> dict[str, int]:
    """Masters and moments. In fp32 the masters are the shards themselves and no bytes of their own."""
    masters = flat_masters(engine)
    states = [state[key] for state in engine.optimizer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    weights = {p.ds_tensor.untyped_storage().data_ptr() for p in engine.module.parameters() if zero_stage(engine) == 3}
    own = [flat for flat in masters if flat.untyped_storage().data_ptr() not in weights]
    return {"optimizer": storage_bytes([*own, *states])}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Every storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def scenarios(runtime: Runtime) -> dict[str, Any]:
    return {name: measure(runtime, name) for name in ENGINES}


if __name__ == "__main__":
    worker_main(scenarios)
