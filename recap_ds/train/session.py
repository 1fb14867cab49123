"""Everything a training run needs, built in the order that fails early: checks first, then the process group.

``plan_session`` reads the user's files and refuses what does not fit; ``start_session`` joins the process group and
builds the sharded model, engine and shadows. The loop then only loops.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from recap_ds.algo.advantage import AdvantageRing, AdvantageScale
from recap_ds.algo.returns import TaskScale, value_scale
from recap_ds.checkpoint.agreement import on_main
from recap_ds.checkpoint.base import base_folder, ensure_base
from recap_ds.checkpoint.save import remove_unfinished
from recap_ds.checkpoint.start import StartPoint, check_start, fill_heads, find_start
from recap_ds.checkpoint.tile_file import EMA, TARGET
from recap_ds.config import BatchSizes, PiStarRECAPConfig, TrainingConfig, batch_sizes
from recap_ds.data.assemble import Assembler
from recap_ds.data.labels import LabelSet
from recap_ds.data.loader import TransitionDataset
from recap_ds.data.sample import camera_slots, check_data_matches
from recap_ds.data.shard_set import ShardSet
from recap_ds.distributed.ds_config import Precision, load_ds_config, resolve_ds_config
from recap_ds.distributed.engine import build_engine
from recap_ds.distributed.runtime import RankInfo, Runtime, accelerator_is_cpu, start_runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.errors import RunStopped, UsageError
from recap_ds.models.backbones import check_vlm
from recap_ds.models.export_tokenizer import load_tokenizer
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.action_tokens import build_action_tokenizer
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import Tokenizer
from recap_ds.train.run_folder import RunFolder
from recap_ds.train.spikes import SpikeGuard
from recap_ds.train.stopping import StopRequests


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked; nothing built yet. The same on every rank."""

    config: PiStarRECAPConfig
    info: RankInfo
    sizes: BatchSizes
    ds_config: dict[str, Any]
    precision: Precision
    run: RunFolder
    dataset: TransitionDataset
    normalizer: Normalizer
    contract: RobotContract
    tasks: list[str]
    start: StartPoint | None  # whose weights the run begins with

    @property
    def labels_hash(self) -> str | None:
        return hash_of(self.dataset.assembler.labels)

    @property
    def corrections(self) -> Literal["positive", "labelled"]:
        """What they are in the labels that the run reads, or by the rule."""
        labels = self.dataset.assembler.labels
        return "positive" if labels is None else labels.record.settings.label.corrections


@dataclass(frozen=True)
class RunWatch:
    """How a program looks after its run; on its own, a run is asked for nothing and nobody waits for it."""

    requests: StopRequests = field(default_factory=StopRequests)
    mark: Callable[[str], None] = lambda what: None  # what begins now; between two marks the watchdog counts
    tell: Callable[[Exception], None] = lambda error: None  # that this rank fails

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Failures in here are told before anything around it is closed."""
        try:
            yield
        except RunStopped:
            raise
        except Exception as error:
            self.tell(error)
            raise


@dataclass(frozen=True)
class Session:
    """A plan with a process group, an engine and the networks that follow its parameters."""

    plan: Plan
    runtime: Runtime
    engine: Any  # DeepSpeedEngine; only distributed/ imports its type
    shadows: dict[str, Shadow]  # "target" and "ema", those there are
    ring: AdvantageRing | None  # stage joint alone
    peak_rates: dict[str, float]
    fixed_scale: AdvantageScale | None = None  # where there is no ring: what the labels say of each task
    watch: RunWatch = field(default_factory=RunWatch)
    spikes: SpikeGuard | None = None  # training.spike_action

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside the engine's and the shadows': small, and equal on every rank."""
        parts = [part.state_dict() for part in (self.ring, self.spikes) if part is not None]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for part in (self.ring, self.spikes):
            if part is not None:
                part.load_state_dict(tensors)


def plan_session(config: PiStarRECAPConfig, ds_path: str | Path, info: RankInfo) -> Plan:
    """Raises UsageError for everything a user can get wrong."""
    ds_config = load_ds_config(ds_path)
    sizes = batch_sizes(config.training, info.world)
    ds_config, precision = resolve_ds_config(ds_config, config, sizes, accelerator_is_cpu())
    if config.data.shards is None:
        raise UsageError("data.shards: name a folder of shards (recap-ds shards import makes one)")
    shard_set = ShardSet.open(config.data.shards, config.data)
    manifest = shard_set.manifest
    check_data_matches(config, manifest)
    tasks = list(manifest.tasks)
    scale = value_scale(config.value, {name: task.longest for name, task in manifest.tasks.items()}, tasks)
    run = RunFolder(config)
    labels = open_labels(config, shard_set)
    run.check_continues(config, sizes.total, manifest.content_hash(), hash_of(labels))
    start = find_start(config, info)
    check_vlm(config, None if start is None else start.vlm)
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), config)
    tokenizer = _tokenizer(config, start)
    action_tokenizer = None
    if config.learns_action_tokens:
        action_tokenizer = build_action_tokenizer(config.model, config.chunk_size, manifest.action_dim)
    assembler = Assembler(shard_set, config, tokenizer, normalizer, scale, labels, action_tokenizer)
    dataset = _dataset(assembler, config, sizes, info, run)
    contract = _contract(config, shard_set, normalizer, scale)
    return Plan(config, info, sizes, ds_config, precision, run, dataset, normalizer, contract, tasks, start)


def _tokenizer(config: PiStarRECAPConfig, start: StartPoint | None) -> Tokenizer:
    """That of the VLM the run begins with; of a critic's own backbone, that of the settings."""
    return load_tokenizer(None if start is None or config.has_own_backbone else start.export, config)


def _dataset(
    assembler: Assembler, config: PiStarRECAPConfig, sizes: BatchSizes, info: RankInfo, run: RunFolder
) -> TransitionDataset:
    if not config.data.streaming:
        return TransitionDataset(assembler, config, sizes.total, damage_log=run.damaged)
    # Here, because webdataset is slow to import.
    from recap_ds.data.stream import StreamDataset

    return StreamDataset(assembler, config, sizes.total, info.rank, info.world, damage_log=run.damaged)


def hash_of(labels: LabelSet | None) -> str | None:
    return None if labels is None else labels.record.content_hash()


def open_labels(config: PiStarRECAPConfig, shard_set: ShardSet) -> LabelSet | None:
    """The labels of ``data.labels``; None where the run reads none. UsageError where they are not what it means."""
    if config.data.labels is None:
        return None
    # A policy measures no value of its own: only a length that was given can contradict the labels'.
    labels = LabelSet.open(shard_set, config.data.labels, config.value.max_length)
    demos = labels.record.settings.demos
    if demos != config.recap.demos:
        raise UsageError(
            f"recap.demos: {config.recap.demos} here, {demos} when the labels '{config.data.labels}' were made; "
            f"set recap.demos={demos}, or make labels under another tag"
        )
    return labels


def _contract(
    config: PiStarRECAPConfig, shard_set: ShardSet, normalizer: Normalizer, scale: TaskScale
) -> RobotContract:
    manifest = shard_set.manifest
    lengths = scale.max_length.tolist()
    return RobotContract(
        cameras=tuple(camera for camera in camera_slots(config, manifest) if camera is not None),
        camera_slots=config.data.camera_slots,
        image_size=config.model.image_size,
        state_dim=manifest.state_dim,
        action_dim=manifest.action_dim,
        fps=manifest.fps,
        tasks={
            name: TaskContract(prompt=task.prompt, max_length=round(length))
            for (name, task), length in zip(manifest.tasks.items(), lengths, strict=True)
        },
        normalizer=normalizer.to_dict(),
        manifest_hash=manifest.content_hash(),
    )


def start_session(plan: Plan, runtime: Runtime | None = None, watch: RunWatch | None = None) -> Session:
    """In the process group of ``runtime``, or joining it. Collective: every rank must call."""
    config = plan.config
    runtime, watch = runtime or start_runtime(plan.info), watch or RunWatch()
    watch.mark("building the model")
    on_main(runtime, lambda: begin_run(plan))
    builder = ShardedBuilder(plan.ds_config, runtime.device)
    policy = build_policy(plan, builder, runtime)
    groups = policy.parameter_groups()
    peak_rates = {group["name"]: group["lr"] for group in groups}
    watch.mark("building the engine")
    engine = build_engine(policy, groups, plan.ds_config, betas=config.training.betas)
    watch.mark("recording the frozen base")
    ensure_base(plan.run.path, engine.module, config, runtime, plan.start.vlm if plan.start else None)
    ring = None
    if config.training.stage == "joint":
        ring = AdvantageRing(len(plan.tasks), config.recap.advantage_window, runtime.device)
    shadows = build_shadows(policy, config)
    scale = label_scale(plan, runtime.device)
    guard = build_spike_guard(config.training, runtime.device)
    return Session(plan, runtime, engine, shadows, ring, peak_rates, scale, watch, guard)


def build_spike_guard(training: TrainingConfig, device: torch.device) -> SpikeGuard | None:
    if training.spike_action == "none":
        return None
    return SpikeGuard(training.spike_window_steps, training.spike_window_steps // 2, training.spike_deviations, device)


def build_policy(plan: Plan, builder: ShardedBuilder, runtime: Runtime) -> PiStarRECAPPolicy:
    """With the weights the run begins with; a checkpoint replaces them later. Collective: every rank must call."""
    start = plan.start
    if start is None:
        return PiStarRECAPPolicy(plan.config, builder, vlm_folder=base_folder(plan.run.path))
    check_start(start, runtime)
    policy = PiStarRECAPPolicy(plan.config, builder, vlm_folder=str(start.vlm))
    fill_heads(start, policy, builder, runtime)
    return policy


def label_scale(plan: Plan, device: torch.device) -> AdvantageScale:
    """The spread of the labels' advantages per task; nothing is above a threshold, as labels are decided already."""
    labels = plan.dataset.assembler.labels
    infinite = torch.full((len(plan.tasks),), torch.inf, device=device)
    sigma = infinite if labels is None else torch.from_numpy(labels.sigma).to(device)
    return AdvantageScale(infinite, sigma, torch.zeros(len(plan.tasks), dtype=torch.bool, device=device))


def begin_run(plan: Plan) -> None:
    """Take the run folder for this process and write down what the run is. Rank 0 only."""
    plan.run.lock()
    plan.run.stop_file.unlink(missing_ok=True)  # of an earlier start: it was obeyed, or came too late
    remove_unfinished(plan.run.checkpoints)  # a full disk could hold nothing else
    plan.run.start(plan.config, plan.ds_config, plan.sizes.total, plan.contract.manifest_hash, plan.labels_hash)
    plan.contract.save(plan.run.path)


def build_shadows(policy: PiStarRECAPPolicy, config: PiStarRECAPConfig) -> dict[str, Shadow]:
    """The target critic follows the Q networks; the average, where wanted, every trainable parameter."""
    prefix, shadows = "critic.q.", {}
    trainable = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if "target_critic" in config.heads:
        online = {name: parameter for name, parameter in trainable.items() if name.startswith(prefix)}
        by_name = dict(policy.target_critic.named_parameters())
        shadows[TARGET] = Shadow(online, {name: by_name[name.removeprefix(prefix)] for name in online})
    if config.training.ema_decay is not None:
        shadows[EMA] = Shadow(trainable)
    return shadows
