"""One recipe on one number of GPUs: memory by what holds it, traffic, and an estimate of time.

Memory adds what is there all the time to the largest of three moments: the backward, with activations and gathered
parameters; the optimizer step, when both are gone; and held-out evaluation, which keeps the weights that EMA replaces.
"""

from typing import Any, NamedTuple

from recap_ds.config import BatchSizes, PiStarRECAPConfig, batch_sizes
from recap_ds.distributed.ds_config import resolve_ds_config
from recap_ds.distributed.footprint import (
    EngineBytes,
    engine_bytes,
    offloads,
    parameter_bytes,
    reduced_bytes,
    shadow_bytes,
)
from recap_ds.distributed.gathering import gather_totals
from recap_ds.plan.hardware import COMPUTE_SHARE, FRAGMENTATION, LINK_SHARE, RESERVED_GIB, Gpu, Range
from recap_ds.plan.sizing import Sizer

GIB = 2**30
ONLINE_Q = "critic.q."


class Traffic(NamedTuple):
    """Bytes that reach a GPU in one optimizer step."""

    gathered: int  # parameters
    scattered: int  # gradients
    within_node: int  # of these, what never leaves a node: hpZ's gathers


class Memory(NamedTuple):
    """Bytes per GPU, but for ``host`` (per rank)."""

    weights: int
    gradients: int
    optimizer: int
    averages: int  # target networks' and EMA's fp32
    buckets: int
    gathered: int  # whole parameters, small ones for good
    activations: int
    saved: int  # of these, what autograd keeps from forward to backward
    moments: dict[str, int]  # what each holds beyond the four that stay
    reserve: int
    host: int

    @property
    def fullest(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def total(self) -> int:
        stays = self.weights + self.gradients + self.optimizer + self.averages
        return stays + self.moments[self.fullest] + self.reserve


class Estimate(NamedTuple):
    sizes: BatchSizes
    memory: Memory
    traffic: Traffic
    step_seconds: Range
    model_flops_utilisation: Range  # of useful operations, so recomputation lowers it

    def fits(self, memory_gib: float) -> bool:
        return self.memory.total <= memory_gib * GIB


class Setting(NamedTuple):
    """What a row of the table is computed from."""

    config: PiStarRECAPConfig
    ds: dict[str, Any]  # as in the JSON, not resolved
    world: int


def estimate(sizer: Sizer, setting: Setting, gpu: Gpu, gpus_per_node: int) -> Estimate:
    """Raises UsageError where the batch or hpZ's groups do not divide."""
    config, world = setting.config, setting.world
    sizes = batch_sizes(config.training, world)
    ds_config, _ = resolve_ds_config(setting.ds, config, sizes, on_cpu=False)
    sharded = ds_config["zero_optimization"]["stage"] == 3
    measure = sizer.measure(sizes.micro, config.training.activation_checkpointing, sharded)
    gathers = gather_totals([p.numel for p in sizer.parameters], measure.visits, ds_config["zero_optimization"], world)
    memory = _memory(sizer, config, ds_config, world, measure, gathers.peak_held)
    traffic = _traffic(sizer, ds_config, sizes, gathers.received)
    model_flops = sizer.measure(sizes.micro, False, sharded).flops * sizes.accumulation
    seconds = _step_seconds(measure.flops * sizes.accumulation, traffic, ds_config, world, gpu, gpus_per_node)
    peak = gpu.peak_flops(ds_config["bf16"]["enabled"])
    utilisation = Range(*(model_flops / (duration * peak) for duration in (seconds.high, seconds.low)))
    return Estimate(sizes, memory, traffic, seconds, utilisation)


def averages_bytes(sizer: Sizer, config: PiStarRECAPConfig, world: int) -> int:
    """The shadows that ``train.session.build_shadows`` makes."""
    trainable = [p for p in sizer.parameters if p.group]
    ema = trainable if config.training.ema_decay is not None else []
    followed = [p for p in trainable if p.name.startswith(ONLINE_Q)] if "target_critic" in config.heads else []
    return shadow_bytes((p.numel for p in (*ema, *followed)), world)


def _memory(
    sizer: Sizer, config: PiStarRECAPConfig, ds_config: dict[str, Any], world: int, measure: Any, gathered: int
) -> Memory:
    engine: EngineBytes = engine_bytes(sizer.parameters, ds_config, world)
    averages = averages_bytes(sizer, config, world)
    on_host = offloads(ds_config["zero_optimization"], "optimizer")
    held = engine.persistent + gathered * parameter_bytes(ds_config)
    bucket = engine.standing_bucket
    moments = {
        "backward": engine.buckets + held + measure.peak_bytes,
        "step": bucket + engine.persistent + engine.step,
    }
    if config.data.held_out_fraction > 0:
        replaced = 0 if config.training.ema_decay is None else engine.trainable_weights
        moments["evaluation"] = bucket + held + replaced + sizer.measure_evaluation(config.evaluation.batch_size)
    return Memory(
        weights=engine.weights + engine.secondary,
        gradients=engine.gradients,
        optimizer=engine.optimizer,
        averages=0 if on_host else averages,
        buckets=engine.buckets,
        gathered=held,
        activations=measure.peak_bytes,
        saved=measure.saved_bytes,
        moments=moments,
        reserve=int(RESERVED_GIB * GIB + FRAGMENTATION * max(moments.values())),
        host=engine.host + (averages if on_host else 0),
    )


def _traffic(sizer: Sizer, ds_config: dict[str, Any], sizes: BatchSizes, received: int) -> Traffic:
    others = (sizes.world - 1) / sizes.world
    zero, width = ds_config["zero_optimization"], parameter_bytes(ds_config)
    trainable = sum(p.numel for p in sizer.parameters if p.group)
    scattered = trainable * reduced_bytes(ds_config) * sizes.accumulation * others
    if zero["stage"] == 2:  # parameters are whole; the updated ones come back once
        return Traffic(int(trainable * width * others), int(scattered), 0)
    gathered = received * width * sizes.accumulation * others
    within = 0.0
    if zero.get("zero_hpz_partition_size", 1) > 1:
        # Trainable parameters cross the network once after every step; frozen ones did so once and for all.
        within = max(gathered - trainable * width * others, 0.0)
    return Traffic(int(gathered), int(scattered), int(within))


def _step_seconds(
    flops: int, traffic: Traffic, ds_config: dict[str, Any], world: int, gpu: Gpu, gpus_per_node: int
) -> Range:
    """From all traffic hidden behind compute to none of it."""
    link = gpu.node_gbytes * 1e9
    # A ring over nodes enters each of them once for every byte of the result, over all its adapters together.
    across = min(link, gpu.network_gbytes * 1e9) if world > gpus_per_node else link
    crossing = traffic.gathered + traffic.scattered - traffic.within_node
    communication = traffic.within_node / link + crossing / across
    compute = flops / gpu.peak_flops(ds_config["bf16"]["enabled"])
    return Range(
        max(compute / COMPUTE_SHARE.high, communication / LINK_SHARE.high),
        compute / COMPUTE_SHARE.low + communication / LINK_SHARE.low,
    )
