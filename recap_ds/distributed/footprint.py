"""What one rank's engine holds, by arithmetic: shards with their padding, masters, Adam's moments, gradients, buckets.

The same rules as DeepSpeed 0.19.8's (``stage3.py``, ``stage_1_and_2.py``, ``partition_parameters.py``) for the
configurations that ``ds_config.py`` lets through; ``tests/plan`` holds these numbers against the bytes of real
engines. Activations and gathered parameters depend on the model's order and are measured elsewhere. No tensors here.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from recap_ds.errors import UsageError

FP32_BYTES = 4
# Data types of the DeepSpeed configuration, by the names it accepts.
DTYPE_BYTES = {"fp32": 4, "float32": 4, "float": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2}


class ParameterSize(NamedTuple):
    name: str
    numel: int
    group: str | None  # of the optimizer; None is frozen


class EngineBytes(NamedTuple):
    """Per rank, on its device but for ``host``."""

    weights: int  # shards of all parameters; under stage 2 all of them whole
    secondary: int  # hpZ: the node's second copy of the shards
    persistent: int  # small parameters, which stay gathered
    gradients: int
    optimizer: int  # fp32 masters and both moments
    trainable_weights: int  # of the weights, what is trained: this rank's forward copies
    buckets: int  # gradients on their way to the ranks that own them
    standing_bucket: int  # of the buckets, what is there outside the backward too
    step: int  # only within the optimizer step: the fp32 gradients of one sub-group in one piece
    host: int  # what is offloaded

    @property
    def resident(self) -> int:
        """Held all the time, whatever is computed."""
        return self.weights + self.secondary + self.persistent + self.gradients + self.optimizer


def shard_elements(numel: int, world: int) -> int:
    """Elements of a parameter that every rank keeps under ZeRO-3, the padding of the last one included."""
    return -(-numel // world)


def offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device", "none") == "cpu"


def engine_bytes(sizes: Sequence[ParameterSize], ds_config: dict[str, Any], world: int) -> EngineBytes:
    """``ds_config``: resolved for ``world`` ranks."""
    if ds_config["zero_optimization"]["stage"] == 3:
        return _stage3_bytes(sizes, ds_config, world)
    return _stage2_bytes(sizes, ds_config, world)


def _stage3_bytes(sizes: Sequence[ParameterSize], ds_config: dict[str, Any], world: int) -> EngineBytes:
    zero, width = ds_config["zero_optimization"], parameter_bytes(ds_config)
    shards = {size.name: shard_elements(size.numel, world) for size in sizes}
    owned = sum(shards[size.name] for size in sizes if size.group)
    threshold = int(zero["stage3_param_persistence_threshold"])
    small = sum(size.numel for size in sizes if size.numel <= threshold)
    weights = width * sum(shards.values())
    masters = FP32_BYTES * owned
    gradients = _accumulation_bytes(ds_config) * owned
    hpz = zero.get("zero_hpz_partition_size", 1)
    aligned = sum(shards[size.name] * world for size in sizes if size.numel > threshold)
    on_host, weights_on_host = offloads(zero, "optimizer"), offloads(zero, "param")
    # Masters are a copy without bf16 too: DeepSpeed compares a torch.device with a string and finds them different.
    optimizer = 3 * masters
    # On the host masters have gradients of their own.
    host = on_host * (optimizer + masters + gradients) + weights_on_host * weights
    return EngineBytes(
        weights=0 if weights_on_host else weights,
        secondary=width * aligned // hpz if hpz > 1 else 0,
        persistent=width * small if world > 1 else 0,
        gradients=0 if on_host else gradients,
        optimizer=0 if on_host else optimizer,
        trainable_weights=width * owned,
        buckets=_stage3_buckets(sizes, ds_config, world),
        standing_bucket=int(zero["reduce_bucket_size"]) * reduced_bytes(ds_config),
        step=0 if on_host else FP32_BYTES * _largest_sub_group(sizes, shards, int(zero.get("sub_group_size", 10**9))),
        host=host,
    )


def _stage3_buckets(sizes: Sequence[ParameterSize], ds_config: dict[str, Any], world: int) -> int:
    """The bucket, and what is scattered from it: copied once to interleave the ranks' parts, kept in the accumulation
    dtype on arrival. A parameter larger than the bucket goes alone, and without a copy where it divides evenly.
    """
    bucket, width = int(ds_config["zero_optimization"]["reduce_bucket_size"]), reduced_bytes(ds_config)
    trainable = [size.numel for size in sizes if size.group]
    alone = max((numel for numel in trainable if numel > bucket and numel % world), default=0)
    together = min(bucket, sum(numel for numel in trainable if numel <= bucket))
    scattered = max(alone, together)
    return width * (bucket + scattered) + _accumulation_bytes(ds_config) * shard_elements(scattered, world)


def _largest_sub_group(sizes: Sequence[ParameterSize], shards: dict[str, int], limit: int) -> int:
    """Elements of this rank's largest sub-group: a group is cut behind the parameter that reaches the limit."""
    largest = 0
    for group in dict.fromkeys(size.group for size in sizes if size.group):
        elements = 0
        for size in sizes:
            if size.group == group:
                elements += shards[size.name]
                largest = max(largest, elements)
                if elements >= limit:
                    elements = 0
    return largest


def _stage2_bytes(sizes: Sequence[ParameterSize], ds_config: dict[str, Any], world: int) -> EngineBytes:
    zero, width = ds_config["zero_optimization"], parameter_bytes(ds_config)
    groups = dict.fromkeys(size.group for size in sizes if size.group)
    # Every group is one flat buffer, a multiple of two elements per rank.
    flat = {name: _round_up(_numel(size for size in sizes if size.group == name), 2 * world) for name in groups}
    owned = sum(flat.values()) // world
    frozen = _numel(size for size in sizes if not size.group)
    on_host = offloads(zero, "optimizer")
    optimizer, gradients = 3 * FP32_BYTES * owned, _accumulation_bytes(ds_config) * owned
    num_buckets = 2 if zero.get("overlap_comm", False) else 1
    return EngineBytes(
        weights=width * (sum(flat.values()) + frozen),
        secondary=0,
        persistent=0,
        gradients=0 if on_host else gradients,
        optimizer=0 if on_host else optimizer,
        trainable_weights=width * sum(flat.values()),
        buckets=num_buckets * int(zero["reduce_bucket_size"]) * width,
        standing_bucket=0,
        step=0,
        host=on_host * (optimizer + FP32_BYTES * owned),
    )


def shadow_bytes(numels: Iterable[int], world: int) -> int:
    """fp32 averages of trainable parameters (``shadows.py``), beside the masters they follow."""
    return FP32_BYTES * sum(shard_elements(numel, world) for numel in numels)


def parameter_bytes(ds_config: dict[str, Any]) -> int:
    return 2 if ds_config["bf16"]["enabled"] else FP32_BYTES


def reduced_bytes(ds_config: dict[str, Any]) -> int:
    """Of one gradient element on its way between ranks."""
    return _dtype_bytes(ds_config, ds_config.get("communication_data_type"))


def _accumulation_bytes(ds_config: dict[str, Any]) -> int:
    return _dtype_bytes(ds_config, ds_config.get("data_types", {}).get("grad_accum_dtype"))


def _dtype_bytes(ds_config: dict[str, Any], name: str | None) -> int:
    if name is None:
        return parameter_bytes(ds_config)
    if name not in DTYPE_BYTES:
        raise UsageError(f"DeepSpeed config: {name!r} is not a data type; there are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def _numel(sizes: Iterable[ParameterSize]) -> int:
    return sum(size.numel for size in sizes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
