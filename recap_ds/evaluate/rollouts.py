"""Rollout evaluation: a policy plays episodes of an environment, spread over ranks and environment processes.

Episode n has the seed ``evaluation.rollout_seed`` + n and its own noise, whatever indicator, guidance or checkpoint
acts: they are compared pair by pair. A second checkpoint is told its own words and sees through its own cameras, in
pictures of its own size; the scene, the clock and what counts as success are the same. Where an episode was played
cannot be seen in its result (in float32, on one kind of device).
"""

import itertools
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recap_ds.config import CollectConfig, EnvConfig, EvaluationConfig, PiStarRECAPConfig
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.envs.interface import EnvSpec
from recap_ds.errors import UsageError
from recap_ds.evaluate.video import check_encoder, write_video
from recap_ds.models.pretrained import Pretrained, load_pretrained
from recap_ds.rollout.actor import Actor, Arm, Judge, check_acts, choose_arms, load_judge
from recap_ds.rollout.episode import EpisodePlan, PlayRules
from recap_ds.rollout.runner import Rollout, run_episodes, share_of_rank
from recap_ds.rollout.workers import Workers, count_workers
from recap_ds.rollout.world import World, open_world

REPORT_SECONDS = 30.0
# Ranks whose episodes end early wait for the others.
WAIT_SECONDS = 7 * 24 * 3600.0
VIDEOS_NAME = "videos"
# env.* that ties a world to a policy: each has its own. All else is the same episode for everyone.
SEEN_BY_POLICY = {"cameras", "image_size", "prompts", "max_mesh_faces", "state_key"}


class Entry(NamedTuple):
    """One way to act of one checkpoint: a row of the results. The first entry is what the others are compared with."""

    checkpoint: str
    arm: Arm


class Contestant(NamedTuple):
    """One checkpoint, the world as it sees it, and which of the entries are its."""

    world: World
    actor: Actor
    entries: list[int]


class RolloutJob(NamedTuple):
    entries: list[Entry]
    contestants: list[Contestant]
    config: PiStarRECAPConfig
    num_episodes: int
    num_workers: int

    @property
    def evaluation(self) -> EvaluationConfig:
        return self.config.evaluation

    @property
    def spec(self) -> EnvSpec:
        """As the first checkpoint sees it; only cameras and the size of pictures are others to the second."""
        return self.contestants[0].world.spec


class Checkpoint(NamedTuple):
    """``said``: as the user called it; ``export``: where it lies."""

    said: str
    export: Path


def open_rollouts(
    checkpoint: Checkpoint,
    policy: Pretrained,
    env: str,
    num_episodes: int,
    info: RankInfo,
    *,
    other: Checkpoint | None = None,
    critic: Path | None = None,
    overrides: Sequence[str] = (),
) -> RolloutJob:
    """Everything checked that needs no process group. ``other``: a second checkpoint, of which the first way to act."""
    check_acts(policy, checkpoint.export, "--checkpoint")
    config = policy.policy.config
    evaluation = config.evaluation
    if evaluation.num_videos:
        check_encoder()
    world = open_world(env, config.env, policy.contract)
    notes = list(world.notes)
    arms = choose_arms(config)
    judge = load_judge(critic, policy)
    entries = [Entry(checkpoint.said, arm) for arm in arms]
    contestants = [Contestant(world, _actor(policy, arms, evaluation, judge), list(range(len(arms))))]
    if other is not None:
        second = load_pretrained(other.export, overrides)
        check_acts(second, other.export, "--compare")
        _check_same_episodes(config.env, second.policy.config.env, other.said)
        seen = open_world(env, second.policy.config.env, second.contract)
        notes += [f"--compare {other.said}: {note}" for note in seen.notes if note not in notes]
        arm = choose_arms(second.policy.config)[0]
        entries.append(Entry(other.said, arm))
        judge = load_judge(critic, second)
        contestants.append(Contestant(seen, _actor(second, [arm], evaluation, judge), [len(arms)]))
    if info.is_main:
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    return RolloutJob(entries, contestants, config, num_episodes, count_workers(evaluation, info.local_world))


def _check_same_episodes(first: EnvConfig, second: EnvConfig, said: str) -> None:
    """What a policy brings along of ``env.*`` may say how it sees the world, not what an episode is."""
    for key in (key for key in EnvConfig.model_fields if key not in SEEN_BY_POLICY):
        ours, theirs = getattr(first, key), getattr(second, key)
        if ours != theirs:
            raise UsageError(
                f"--compare {said}: its env.{key} is {theirs!r}, that of --checkpoint {ours!r}, so their episodes "
                f"cannot be compared; give env.{key}, which holds for both"
            )


def _actor(policy: Pretrained, arms: Sequence[Arm], evaluation: EvaluationConfig, judge: Judge | None) -> Actor:
    return Actor(
        policy,
        arms,
        seed=evaluation.rollout_seed,
        batch_size=evaluation.rollout_batch_size,
        executed_frames=evaluation.executed_frames,
        judge=judge,
    )


def make_plans(job: RolloutJob, contestant: Contestant) -> list[EpisodePlan]:
    """Every episode under every arm; tasks in turn."""
    evaluation, told = job.evaluation, contestant.world.tasks
    tasks = list(told)
    return [
        EpisodePlan(
            number=number,
            seed=evaluation.rollout_seed + number,
            task=tasks[number % len(tasks)],
            prompt=told[tasks[number % len(tasks)]].prompt,
            arm=arm,
            keeps_pictures=number < evaluation.num_videos,
        )
        for arm in range(len(contestant.entries))
        for number in range(job.num_episodes)
    ]


class PlayedRollouts(NamedTuple):
    records: list[dict[str, Any]]  # of every episode of every entry, in order
    wall_seconds: float


def play_rollouts(job: RolloutJob, runtime: Runtime, videos: Path) -> PlayedRollouts:
    """All ranks' episodes, on every rank. Collective: every rank must call.

    ``videos``: a folder that all ranks can write.
    """
    info = runtime.info
    rules = PlayRules(CollectConfig(), seed=job.evaluation.rollout_seed)
    records: list[dict[str, Any]] = []
    start = report_time = time.monotonic()
    # Nodes may differ in cores; who plays what must be agreed.
    num_workers = runtime.broadcast_object(job.num_workers)
    most_plans = job.num_episodes * len(job.entries)
    # Who sees the world alike is served by the same processes.
    for settings, alike in itertools.groupby(job.contestants, key=lambda contestant: contestant.world.settings):
        with Workers(settings, rules, min(num_workers, most_plans)) as workers:
            for contestant in alike:
                actor, entries = contestant.actor, contestant.entries
                actor.to(runtime.device)
                plans = share_of_rank(make_plans(job, contestant), num_workers, info.rank, info.world)
                for rollout in run_episodes(plans, workers, actor.decide, job.evaluation.rollout_batch_size):
                    entry = entries[rollout.played.plan.arm]
                    records.append(_record(rollout, entry, _film(job, entry, rollout, videos)))
                    if info.is_main and time.monotonic() > report_time + REPORT_SECONDS:
                        report_time = time.monotonic()
                        print(f"rollouts  {len(records)} episodes of rank 0 so far", file=sys.stderr, flush=True)
                actor.to_host()
    everyone = [record for part in runtime.gather_objects(records) for record in part]
    everyone.sort(key=lambda record: (record["entry"], record["episode"]))
    return PlayedRollouts(everyone, time.monotonic() - start)


def _record(rollout: Rollout, entry: int, video: str | None) -> dict[str, Any]:
    played = rollout.played
    return {
        "entry": entry,
        "episode": played.plan.number,
        "seed": played.plan.seed,
        "task": played.plan.task,
        "success": played.success,
        "frames": played.num_frames,
        "sum_reward": float(played.rewards.sum(dtype=np.float64)),
        "max_reward": float(played.rewards.max()),
        "rendered": played.num_rendered,
        # What was done, in four bytes: two evaluations that agree here agree to the last bit.
        "actions_crc32": zlib.crc32(played.actions.tobytes()),
        "video": video,
    }


def _film(job: RolloutJob, entry: int, rollout: Rollout, videos: Path) -> str | None:
    """Path of the film, relative to the folder of ``videos``; None where the plan asked for none."""
    played = rollout.played
    if not played.plan.keeps_pictures:
        return None
    arm = job.entries[entry].arm
    told = "no indicator" if arm.indicator is None else f"{arm.indicator}, beta {arm.guidance_beta:g}"
    path = videos / f"entry{entry}_{arm.name}_episode{played.plan.number:04d}.mp4"
    write_video(path, played, rollout.values, f"{job.spec.name}   {told}", job.spec.fps)
    return f"{videos.name}/{path.name}"
