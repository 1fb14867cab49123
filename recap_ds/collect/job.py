"""What is to be collected, checked against the world, the policy and the shards it is to join.

A policy, a policy that is corrected, or the expert alone plays: three kinds, each a data set of its own
(``<name>_auto``, ``_intervention``, ``_demo``), whose episode n is a pure function of the seed, n, the checkpoint and
the settings, unless a person corrects. Without a checkpoint the expert itself, made mediocre, stands in for the policy:
data for studies.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recap_ds.config import PiStarRECAPConfig, SourceName
from recap_ds.data.draws import identity_of
from recap_ds.data.manifest import MANIFEST_NAME, Manifest, check_agreement
from recap_ds.errors import UsageError
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.pretrained import Pretrained
from recap_ds.rollout.actor import Actor, Arm, check_acts, choose_arms, load_judge
from recap_ds.rollout.episode import CorrectorName
from recap_ds.rollout.keyboard import moves_of
from recap_ds.rollout.window import check_display
from recap_ds.rollout.world import World, open_world

# With the numbers of episodes added, still a seed for every simulator.
MAX_SEED = 2**30
# Scenes that an evaluation may well play, from evaluation.rollout_seed on.
NUM_EVALUATED = 1000


class Kind(NamedTuple):
    """A way to collect. ``offset``: keeps the episodes, seeds and noise of the three apart."""

    source: SourceName
    mode: Literal["policy", "corrected", "expert"]
    offset: int


AUTO = Kind("auto", "policy", 0)
INTERVENTION = Kind("intervention", "corrected", 1_000_000)
DEMO = Kind("demo", "expert", 2_000_000)


@dataclass(frozen=True)
class CollectJob:
    out: Path
    name: str
    seed: int
    config: PiStarRECAPConfig
    world: World
    actor: Actor | None  # None where the expert stands in for a policy
    arm: Arm | None  # how the policy acts
    checkpoint: str | None  # as the user called it
    checkpoint_hash: str | None
    critic_hash: str | None
    corrector: CorrectorName
    goals: dict[Kind, int]  # episodes that OUT is to hold
    stored: dict[str, int]  # action_width, td_horizon, image_size of the shards

    def dataset(self, kind: Kind) -> str:
        return f"{self.name}_{kind.source}"

    @property
    def layout(self) -> dict[str, Any]:
        """What all episodes of a folder share; the keys are the manifest's."""
        return _layout(self.world)

    @property
    def notes(self) -> list[str]:
        """What is allowed and probably not meant."""
        first = self.config.evaluation.rollout_seed
        notes = list(self.world.notes)
        for kind, count in self.goals.items():
            seeds = range(self.seed + kind.offset, self.seed + kind.offset + count)
            if seeds.start < first + NUM_EVALUATED and first < seeds.stop:
                notes.append(
                    f"{self.dataset(kind)}: its scenes have the seeds {seeds.start} to {seeds.stop - 1}, and an "
                    f"evaluation plays those from {first} on; give another --seed to learn nothing of what it asks"
                )
        return notes

    def provenance(self, kind: Kind) -> dict[str, Any]:
        """All that an episode of ``kind`` follows from, in JSON's types."""
        env, collect, evaluation = self.config.env, self.config.collect, self.config.evaluation
        made_by = {"env": self.world.spec.name, "seed": self.seed, "env_settings": env.model_dump(mode="json")}
        if kind is DEMO:
            return made_by | {"demo_noise": collect.demo_noise}
        if self.arm is None:
            keys = ["expert_speed", "expert_bias", "expert_noise"]
        else:
            keys = []
            made_by |= {
                "checkpoint_hash": self.checkpoint_hash,
                "acts": self.arm.name,
                "executed_frames": evaluation.executed_frames,
                "rollout_batch_size": evaluation.rollout_batch_size,
            }
        if kind is INTERVENTION and self.corrector == "keyboard":
            made_by["corrector"] = self.corrector
        elif kind is INTERVENTION:
            made_by["critic_hash"] = self.critic_hash
            keys += ["progress", "stall_frames", "stall_margin", "correction_frames"]
        return made_by | {key: value for key, value in collect.model_dump().items() if key in keys}


def open_collection(
    out: Path,
    env: str,
    goals: dict[Kind, int],
    config: PiStarRECAPConfig,
    *,
    policy: Pretrained | None = None,
    checkpoint: str | None = None,
    export: Path | None = None,
    critic: Path | None = None,
    name: str | None = None,
    seed: int | None = None,
    corrector: CorrectorName = "script",
) -> CollectJob:
    """Everything checked before the first episode. ``config``: the policy's, where there is one."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder of shards, new or not")
    if corrector == "keyboard":
        _check_keyboard(goals, critic)
    if policy is not None:
        check_acts(policy, export, "--checkpoint")
    elif critic is not None:
        raise UsageError("--critic: is read only where a policy acts; give --checkpoint")
    manifest = Manifest.load(out) if (out / MANIFEST_NAME).exists() else None
    contract = policy.contract if policy is not None else None
    world = open_world(env, config.env, contract, manifest.image_size if manifest else None)
    unaided = {AUTO, INTERVENTION} if corrector == "keyboard" else {AUTO}
    if not world.spec.has_expert and (policy is None or not unaided >= set(goals)):
        raise UsageError(
            f"--env {env}: has no scripted expert; only --episodes of a --checkpoint can be collected, "
            "and its --corrections with --keyboard"
        )
    if corrector == "keyboard":
        moves_of(world.spec)
    name = name or re.sub(r"[^A-Za-z0-9_-]", "_", out.resolve().name)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        raise UsageError(f"--name {name}: write it with at most 80 letters, digits, - and _")
    if seed is not None and seed >= MAX_SEED:
        raise UsageError(f"--seed {seed}: give one below {MAX_SEED}")
    # Folders of several iterations should not all begin with the same scenes.
    seed = identity_of("collect", name) % MAX_SEED if seed is None else seed
    return CollectJob(
        out=out,
        name=name,
        seed=seed,
        config=config,
        world=world,
        actor=None if policy is None else _actor(policy, config, goals, critic, seed, corrector),
        arm=None if policy is None else choose_arms(config)[0],
        checkpoint=checkpoint,
        checkpoint_hash=None if export is None else ExportRecord.load(export).content_hash(),
        critic_hash=None if critic is None else ExportRecord.load(critic).content_hash(),
        corrector=corrector,
        goals=goals,
        stored=_stored(out, manifest, config, world),
    )


def _check_keyboard(goals: dict[Kind, int], critic: Path | None) -> None:
    if set(goals) != {INTERVENTION}:
        raise UsageError("--keyboard: is for --corrections alone; collect the others by a command without it")
    if critic is not None:
        raise UsageError("--critic: is not read with --keyboard, where a person sees when to take over; leave it out")
    check_display()


def _actor(
    policy: Pretrained,
    config: PiStarRECAPConfig,
    goals: dict[Kind, int],
    critic: Path | None,
    seed: int,
    corrector: CorrectorName,
) -> Actor:
    judge = None
    if corrector == "script" and config.collect.progress == "value" and INTERVENTION in goals:
        judge = load_judge(critic, policy)
        if judge is None:
            raise UsageError("collect.progress: value needs a critic; give --critic, or set it to environment")
    elif critic is not None:
        raise UsageError("--critic: is read only by --corrections with collect.progress=value")
    evaluation = config.evaluation
    return Actor(
        policy,
        choose_arms(config)[:1],
        seed=seed,
        batch_size=evaluation.rollout_batch_size,
        executed_frames=evaluation.executed_frames,
        judge=judge,
    )


def _layout(world: World) -> dict[str, Any]:
    spec = world.spec
    return {
        "cameras": tuple(sorted(spec.cameras)),
        "state_dim": spec.state_dim,
        "action_dim": spec.action_dim,
        "fps": spec.fps,
        "image_size": spec.image_size,
    }


def _stored(out: Path, manifest: Manifest | None, config: PiStarRECAPConfig, world: World) -> dict[str, int]:
    """The format of the shards; UsageError where the episodes could not join those that are there."""
    if manifest is None:
        return {"action_width": config.chunk_size, "td_horizon": config.chunk_size, "image_size": world.spec.image_size}
    check_agreement(out, manifest, _layout(world))
    for known in world.tasks.values():
        there = manifest.tasks.get(known.name)
        if there is not None and there.prompt != known.prompt:
            raise UsageError(f"{out}: task '{known.name}' has the prompt {there.prompt!r} there, {known.prompt!r} here")
    return {key: getattr(manifest, key) for key in ("action_width", "td_horizon", "image_size")}
