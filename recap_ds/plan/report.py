"""The plan of a recipe as text: what is known exactly first, estimates after it and marked as such."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import torch

from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.data.manifest import Manifest
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.errors import UsageError
from recap_ds.plan.advice import find_mend, variants
from recap_ds.plan.architecture import vlm_architecture
from recap_ds.plan.estimate import GIB, Estimate, Setting, estimate
from recap_ds.plan.files import file_sizes
from recap_ds.plan.hardware import COMPUTE_SHARE, FRAGMENTATION, LINK_SHARE, RESERVED_GIB, Gpu, Range
from recap_ds.plan.sizing import Sizer

WORLDS = (1, 8, 16, 32)
ASSUMED_CAMERAS = 2
LINE_LENGTH = 120  # of prose; tables are wider
COLUMNS = ("weights", "grads", "optimizer", "averages", "buckets", "gathered", "activations", "reserve")


class Cluster(NamedTuple):
    num_gpus: int
    gpus_per_node: int
    gpu: Gpu
    memory_gib: float


def plan_lines(config: PiStarRECAPConfig, ds_path: str | Path, cluster: Cluster) -> Iterator[str]:
    """Raises UsageError for everything a user can get wrong, before the first line."""
    ds = load_ds_config(ds_path)
    # Precision does not depend on how many ranks there are; one of the smallest batch is enough to ask.
    _, precision = resolve_ds_config(ds, config, BatchSizes(micro=1, accumulation=1, world=1), on_cpu=False)
    num_cameras, cameras = count_cameras(config)
    with vlm_architecture(config) as architecture:
        sizer = Sizer(config, precision.dtype, architecture.folder, num_cameras)
        setting = Setting(config, ds, cluster.num_gpus)
        chosen = estimate(sizer, setting, cluster.gpu, cluster.gpus_per_node)

        yield f"{config.name}: stage {config.training.stage}, {ds_path}, {cluster.gpu.name}, {cluster.memory_gib:g} GiB"
        yield f"VLM: {architecture.source}"
        yield f"images: {num_cameras} of {config.model.image_size} px per observation ({cameras})"
        yield precision.text
        yield ""
        yield from _parameters(sizer)
        yield ""
        yield "memory per GPU in GiB"
        yield from _table(sizer, setting, cluster)
        yield ""
        yield f"on {cluster.num_gpus} GPUs, one change at a time"
        yield from _variants(sizer, setting, chosen, cluster)
        yield ""
        yield from _files(sizer, config, precision.dtype)
        yield ""
        yield from _assumptions(cluster)


def count_cameras(config: PiStarRECAPConfig) -> tuple[int, str]:
    """How many images an observation has, and who says so."""
    if config.data.cameras == ():
        raise UsageError("data.cameras: must name at least one camera")
    if config.data.camera_slots is not None:
        return len(config.data.camera_slots), "data.camera_slots"
    if config.data.cameras is not None:
        return len(config.data.cameras), "data.cameras"
    if config.data.shards is not None and Path(config.data.shards).is_dir():
        return len(Manifest.load(config.data.shards).cameras), config.data.shards
    return ASSUMED_CAMERAS, "assumed; data.cameras or data.shards would say"


def _parameters(sizer: Sizer) -> Iterator[str]:
    yield f"{'parameters':<16}{'trainable':>16}{'frozen':>16}"
    total = [sum(column) for column in zip(*(part[1:] for part in sizer.parts), strict=True)]
    for name, trainable, frozen in (*sizer.parts, ("total", *total)):
        yield f"{name:<16}{trainable:>16,}{frozen:>16,}"


def _table(sizer: Sizer, setting: Setting, cluster: Cluster) -> Iterator[str]:
    head = "".join(f"{name:>12}" for name in COLUMNS)
    yield f"{'GPUs':>4}  {'batch':<18}{head}{'total':>8}  {'at':<10}  fits  {'step':>12} {'MFU':>9}"
    notes: list[str] = []
    for world in sorted({*WORLDS, cluster.num_gpus}):
        row = setting._replace(world=world)
        try:
            result = estimate(sizer, row, cluster.gpu, cluster.gpus_per_node)
        except UsageError as error:
            yield f"{world:>4}  {error}"
            continue
        sizes = result.sizes
        batch = f"{sizes.total} = {sizes.micro}x{sizes.accumulation}x{world}"
        fits = "yes" if result.fits(cluster.memory_gib) else "NO"
        yield f"{world:>4}  {batch:<18}{_memory(result)}  {result.memory.fullest:<10}  {fits:<4}  {_time(result)}"
        if fits == "NO":
            notes.append(_mend(sizer, row, cluster))
    yield from notes


def _mend(sizer: Sizer, setting: Setting, cluster: Cluster) -> str:
    found = find_mend(sizer, setting, cluster.gpu, cluster.gpus_per_node, cluster.memory_gib)
    where = f"on {setting.world} GPU{'s' if setting.world > 1 else ''}"
    if found is None:
        return f"{where} no smaller batch, checkpointing or offload is enough: use more GPUs, or larger ones"
    texts, result = found
    return f"{where} it fits with {', '.join(texts)}: {result.memory.total / GIB:.1f} GiB, {_host(result)}"


def _variants(sizer: Sizer, setting: Setting, chosen: Estimate, cluster: Cluster) -> Iterator[str]:
    yield f"{'':<42}{'activations':>12}{'total':>8}  fits  {'step':>12} {'MFU':>9}   received per step and GPU"
    rows = [("as configured", chosen)]
    for variant in variants(setting, cluster.gpus_per_node):
        rows.append((variant.text, estimate(sizer, variant.setting, cluster.gpu, cluster.gpus_per_node)))
    for text, result in rows:
        fits = "yes" if result.fits(cluster.memory_gib) else "NO"
        traffic = result.traffic
        received = f"{traffic.gathered / GIB:.1f} + {traffic.scattered / GIB:.1f} GiB"
        within = f", {traffic.within_node / GIB:.1f} of it within the node" if traffic.within_node else ""
        host = f", {_host(result)}" if result.memory.host else ""
        yield (
            f"{text:<42}{result.memory.activations / GIB:>12.2f}{result.memory.total / GIB:>8.1f}  {fits:<4}  "
            f"{_time(result)}   {received}{within}{host}"
        )


def _memory(result: Estimate) -> str:
    memory = result.memory
    parts: Sequence[int] = (
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.averages,
        memory.buckets,
        memory.gathered,
        memory.activations,
        memory.reserve,
    )
    return "".join(f"{part / GIB:>12.2f}" for part in parts) + f"{memory.total / GIB:>8.1f}"


def _time(result: Estimate) -> str:
    seconds, share = result.step_seconds, result.model_flops_utilisation
    return f"{_span(seconds) + ' s':>12} {_span(Range(100 * share.low, 100 * share.high)) + ' %':>9}"


def _span(values: Range) -> str:
    """Two digits: an estimate has no more."""
    return "-".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in values)


def _host(result: Estimate) -> str:
    return f"{result.memory.host / GIB:.1f} GiB of host memory per GPU"


def _files(sizer: Sizer, config: PiStarRECAPConfig, dtype: torch.dtype) -> Iterator[str]:
    sizes = file_sizes(sizer, config, dtype)
    base = f", {sizes.base / GIB:.2f} GiB once per run for the frozen VLM" if sizes.base else ""
    export = f"export {sizes.export / GIB:.2f} GiB in float32"
    yield f"files: {sizes.checkpoint / GIB:.2f} GiB per checkpoint{base}; {export}"


def _assumptions(cluster: Cluster) -> Iterator[str]:
    gpu = cluster.gpu
    yield from wrap(
        "Memory is counted, but for the reserve: "
        f"{RESERVED_GIB:g} GiB for context and NCCL, and {FRAGMENTATION:.0%} of buckets, gathered and activations. "
        "The total is at the moment that holds most: backward, optimizer step or held-out evaluation.",
        LINE_LENGTH,
    )
    yield from wrap(
        f"Step time and MFU are estimates: {COMPUTE_SHARE.low:.0%} to {COMPUTE_SHARE.high:.0%} of the stated "
        f"{gpu.bf16_tflops:g} TFLOP/s in bf16; {LINK_SHARE.low:.0%} to {LINK_SHARE.high:.0%} of "
        f"{gpu.node_gbytes:g} GB/s between GPUs of a node and {gpu.network_gbytes:g} GB/s between nodes of "
        f"{cluster.gpus_per_node}, from hidden behind compute to not at all; without reading data, and without the "
        "host's share where the optimizer is there.",
        LINE_LENGTH,
    )
