"""``recap-ds bench loader``: what exact order and resume cost a loader, beside webdataset's plain pipeline.

Both read the same shards with as many workers, decode the same members by the same code, and are measured in turns;
every ratio is the median of ratios within one round. Ours is that of stage policy: neither decodes next observations.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil

from recap_ds.algo.returns import value_scale
from recap_ds.bench.index_memory import index_memory
from recap_ds.bench.plain_pipeline import plain_loader
from recap_ds.config import BatchSizes, DataConfig, PiStarRECAPConfig
from recap_ds.data.assemble import Assembler
from recap_ds.data.loader import TransitionDataset, build_train_loader
from recap_ds.data.order import SampleOrder
from recap_ds.data.parts import training_parts
from recap_ds.data.sample import SampleDecoder, check_data_matches
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.writer import write_shards
from recap_ds.envs.scripted import DATASET, scripted_episodes
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import build_tokenizer
from recap_ds.recipe import build_config

OURS, PLAIN = "ours", "webdataset"
LATER_STEP = 1_000_000
LANES = (1, 4)
NUM_NODES = 4
ENDLESS = 2**40
# Batches that wait in the queues when a round begins are not its own; as many again, until all workers are busy.
PREFETCH_BATCHES = 4
SKIPPED_BATCHES = 2 * PREFETCH_BATCHES
# Of made shards: enough of them that four nodes can share them out.
SAMPLES_PER_SHARD = 64
EPISODES = {"demo": 24, "auto": 24, "intervention": 12}
CHUNK_SIZE = 10


class Settings(NamedTuple):
    shards: Path | None  # None makes some
    image_size: int
    batch_size: int
    num_workers: int
    num_batches: int  # per round
    num_repeats: int  # rounds
    num_index_samples: int


class Round(NamedTuple):
    seconds: float
    host_seconds: float  # of processor time, of the workers


def bench_loader(settings: Settings) -> dict[str, Any]:
    """Figures as JSON; UsageError where the shards cannot be read."""
    with tempfile.TemporaryDirectory(prefix="recap_ds_bench_") as temporary:
        folder = settings.shards
        if folder is None:
            folder = Path(temporary) / "shards"
            make_shards(folder, settings.image_size)
        shard_set = ShardSet.open(folder)
        dataset, decoder, config = build_dataset(shard_set, settings)
        sizes = BatchSizes(micro=settings.batch_size, accumulation=1, world=1)

        def ours(step: int) -> Iterator[Any]:
            first = step * sizes.total
            return iter(
                build_train_loader(dataset, config, sizes, 0, start_slot=first, num_steps=ENDLESS, pin_memory=False)
            )

        def plain() -> Iterator[Any]:
            return iter(plain_loader(shard_set, decoder, config.data, settings.batch_size))

        rounds = take_rounds({OURS: lambda: ours(0), PLAIN: plain}, settings)
        first = first_batches(ours, settings.num_repeats)
        fetched = {lanes: fetched_bytes(shard_set, config.data, sizes.total, lanes) for lanes in LANES}
        memory = index_memory(shard_set.manifest, settings.num_index_samples)
    return figures(settings, shard_set, rounds, first, fetched) | {
        "index_samples": settings.num_index_samples,
        "index_worker_private_mib": round(memory.private_mib, 1),
        "index_worker_resident_mib": round(memory.resident_mib, 1),
        "index_node_mib": round(memory.table_mib, 1),
    }


def make_shards(folder: Path, image_size: int) -> None:
    """Of the built-in task, two cameras."""
    cameras = ("top", "top_again")
    episodes = (
        episode
        for source, number in EPISODES.items()
        for episode in scripted_episodes(source, number, 0, image_size, cameras)
    )
    write_shards(
        folder,
        episodes,
        dataset=DATASET,
        action_width=CHUNK_SIZE,
        td_horizon=CHUNK_SIZE,
        image_size=image_size,
        samples_per_shard=SAMPLES_PER_SHARD,
    )


def build_dataset(
    shard_set: ShardSet, settings: Settings
) -> tuple[TransitionDataset, SampleDecoder, PiStarRECAPConfig]:
    manifest = shard_set.manifest
    config = build_config(
        {
            "chunk_size": min(CHUNK_SIZE, manifest.action_width),
            "max_action_dim": manifest.action_dim,
            "max_state_dim": manifest.state_dim,
            "model": {"vlm_model_name": "tiny", "image_size": manifest.image_size, "max_prompt_tokens": 1024},
            "recap": {"sft": True},
            "training": {"stage": "policy"},
            "data": {"num_workers": settings.num_workers, "prefetch_batches": PREFETCH_BATCHES},
        }
    )
    check_data_matches(config, manifest)
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), config)
    scale = value_scale(
        config.value, {name: task.longest for name, task in manifest.tasks.items()}, list(manifest.tasks)
    )
    assembler = Assembler(shard_set, config, build_tokenizer("tiny"), normalizer, scale)
    decoder = SampleDecoder(manifest, config, normalizer)
    return TransitionDataset(assembler, config, settings.batch_size), decoder, config


def take_rounds(loaders: dict[str, Callable[[], Iterator[Any]]], settings: Settings) -> dict[str, list[Round]]:
    """Each loader in turn, with its workers kept from round to round."""
    running, workers = {}, {}
    for name, start in loaders.items():
        before = _descendants()
        running[name] = start()
        next(running[name])
        workers[name] = [process for process in _descendants() if process not in before]
    taken: dict[str, list[Round]] = {name: [] for name in loaders}
    for _ in range(settings.num_repeats):
        for name, batches in running.items():
            for _ in islice(batches, SKIPPED_BATCHES):
                pass
            host, began = _host_seconds(workers[name]), time.perf_counter()
            for _ in islice(batches, settings.num_batches):
                pass
            seconds = time.perf_counter() - began
            taken[name].append(Round(seconds, _host_seconds(workers[name]) - host))
    return taken


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _host_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def first_batches(ours: Callable[[int], Iterator[Any]], num_repeats: int) -> dict[int, float]:
    """Seconds from nothing to the first batch, workers started anew, by the step begun at."""
    taken: dict[int, list[float]] = {0: [], LATER_STEP: []}
    for _ in range(num_repeats):
        for step, seconds in taken.items():
            began = time.perf_counter()
            next(ours(step))
            seconds.append(time.perf_counter() - began)
    return {step: median(seconds) for step, seconds in taken.items()}


def fetched_bytes(shard_set: ShardSet, data: DataConfig, batch_size: int, lanes: int) -> float:
    """Of whole shards, that each of NUM_NODES equal nodes reads in an epoch: their mean. Nothing is read here."""
    slots_per_step = -(-batch_size // NUM_NODES) * NUM_NODES
    laned = data.model_copy(update={"lanes": lanes})
    order = SampleOrder(training_parts(shard_set, laned), laned, seed=0, slots_per_step=slots_per_step)
    num_steps = -(-shard_set.num_samples // slots_per_step)
    sizes = np.array([entry.bytes for entry in shard_set.manifest.shards])
    touched = np.zeros((NUM_NODES, len(sizes)), bool)
    for step in range(num_steps):
        samples = order.samples(np.arange(step * slots_per_step, (step + 1) * slots_per_step))[1]
        shards = np.searchsorted(shard_set.shard_starts, samples, side="right") - 1
        touched[np.repeat(np.arange(NUM_NODES), slots_per_step // NUM_NODES), shards] = True
    return float((touched @ sizes).mean())


def figures(
    settings: Settings,
    shard_set: ShardSet,
    rounds: dict[str, list[Round]],
    first: dict[int, float],
    fetched: dict[int, float],
) -> dict[str, Any]:
    samples = settings.num_batches * settings.batch_size
    manifest, pairs = shard_set.manifest, list(zip(rounds[PLAIN], rounds[OURS], strict=True))
    # Of all rounds together: it is counted in hundredths of a second.
    host = {name: max(sum(each.host_seconds for each in taken), 0.01) for name, taken in rounds.items()}
    return {
        "bench": "loader",
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "cameras": len(manifest.cameras),
        "image_size": manifest.image_size,
        "batch_size": settings.batch_size,
        "workers": settings.num_workers,
        "repeats": settings.num_repeats,
        "samples_per_second": {
            name: round(samples / median(each.seconds for each in taken), 1) for name, taken in rounds.items()
        },
        "host_ms_per_sample": {
            name: round(1000 * seconds / (settings.num_repeats * samples), 3) for name, seconds in host.items()
        },
        "ours_over_webdataset": round(median(plain.seconds / ours.seconds for plain, ours in pairs), 3),
        # The same of processor time, which other jobs on a busy machine do not lengthen.
        "ours_over_webdataset_host": round(host[PLAIN] / host[OURS], 3),
        "first_batch_seconds": {f"step_{step}": round(seconds, 3) for step, seconds in first.items()},
        "first_batch_later_over_start": round(first[LATER_STEP] / first[0], 3),
        "nodes": NUM_NODES,
        "set_bytes": sum(entry.bytes for entry in manifest.shards),
        "node_epoch_bytes": {f"lanes_{lanes}": round(number) for lanes, number in fetched.items()},
    }


def table(figure: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"{'':12}{'samples/s':>11}{'host ms':>9}"]
    for name, speed in figure["samples_per_second"].items():
        lines.append(f"{name:12}{speed:>11.1f}{figure['host_ms_per_sample'][name]:>9.3f}")
    first, fetched = figure["first_batch_seconds"].values(), figure["node_epoch_bytes"].values()
    shares = [f"{number / figure['set_bytes']:.0%} with {lanes}" for number, lanes in zip(fetched, LANES, strict=True)]
    return [
        *lines,
        f"ours: {figure['ours_over_webdataset']:.2f} x webdataset; by processor time "
        f"{figure['ours_over_webdataset_host']:.2f} x",
        "first batch at step 0 and {:,}: {:.2f} s and {:.2f} s".format(LATER_STEP, *first),
        f"an index of {figure['index_samples']:,} samples: {figure['index_worker_private_mib']:.0f} MiB per worker and "
        f"{figure['index_node_mib']:.0f} MiB per node, which the kernel may drop",
        f"of all bytes, a node of {figure['nodes']} reads per epoch: {', '.join(shares)} lanes",
    ]
