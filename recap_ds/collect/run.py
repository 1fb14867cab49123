"""Collection: episodes are played, wait in the journal, and become shards of OUT.

The same command goes on where it was stopped, and asked for more episodes it adds those that are missing.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from recap_ds.batch import OUTCOME_IDS
from recap_ds.collect.job import DEMO, CollectJob, Kind
from recap_ds.collect.journal import Journal, Label, episode_name, open_journal
from recap_ds.data.episodes import Episode
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.data.writer import write_shards
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import write_file
from recap_ds.rollout.episode import EpisodePlan, PlayRules
from recap_ds.rollout.keyboard import PersonLeft
from recap_ds.rollout.runner import run_episodes
from recap_ds.rollout.workers import Workers, count_workers

# Shards are written when so many episodes wait: enough to shuffle, few enough to lie around as raw pictures.
EPISODES_PER_WRITE = 64
# Demonstrations that may fail for each that is wanted.
MAX_FAILED_DEMOS_FACTOR = 4
RECORD_NAME = "collection.json"
Report = Callable[[str], None]


class Tally(NamedTuple):
    num_episodes: int
    num_successes: int


def collect(job: CollectJob, device: torch.device, local_world: int, report: Report) -> dict[str, Tally]:
    """Play what is missing and write it; what then is there, by data set.

    A person who closes the window of corrections ends it early. Interrupted, it writes what is finished before it ends;
    killed, that is done when it is called again.
    """
    with open_journal(job.out) as journal:
        _agree_on_record(job)
        _write_waiting(job, journal, report)
        failed_demos: set[int] = set()
        while plans := _missing_plans(job, failed_demos):
            try:
                failed_demos |= _play(job, journal, plans, device, local_world, report)
            except PersonLeft:
                report("the window was closed; the same command goes on with the episodes that are missing")
                break
            finally:
                _write_waiting(job, journal, report)
            _check_expert(job, failed_demos)
    return _tally(job)


def _play(
    job: CollectJob,
    journal: Journal,
    plans: list[EpisodePlan],
    device: torch.device,
    local_world: int,
    report: Report,
) -> set[int]:
    """Returns the numbers of demonstrations that failed: they are not kept."""
    if job.actor is not None:
        job.actor.to(device)
    rules = PlayRules(job.config.collect, job.seed, job.corrector)
    evaluation = job.config.evaluation
    # A person watches one environment.
    num_workers = 1 if job.corrector == "keyboard" else min(count_workers(evaluation, local_world), len(plans))
    kinds = {kind.mode: kind for kind in job.goals}
    decide = None if job.actor is None else job.actor.decide
    failed_demos: set[int] = set()
    with Workers(job.world.settings, rules, num_workers) as workers:
        rollouts = run_episodes(plans, workers, decide, evaluation.rollout_batch_size)
        for done, (played, _) in enumerate(rollouts, start=1):
            if played.plan.mode == "expert" and not played.success:
                failed_demos.add(played.plan.number)
            else:
                journal.add(played, _label(job, kinds[played.plan.mode], played.plan))
            if done % EPISODES_PER_WRITE == 0:
                report(f"{done}/{len(plans)} episodes")
                _write_waiting(job, journal, report)
    return failed_demos


def _check_expert(job: CollectJob, failed_demos: set[int]) -> None:
    """An expert that cannot do the task would be asked for ever."""
    if len(failed_demos) > MAX_FAILED_DEMOS_FACTOR * job.goals.get(DEMO, 0) + MAX_FAILED_DEMOS_FACTOR:
        raise RunFailed(
            f"--demos {job.goals[DEMO]}: the expert of {job.world.spec.name} failed {len(failed_demos)} times; "
            "give it more time (env.max_steps) or less noise (collect.demo_noise)"
        )


def _missing_plans(job: CollectJob, failed_demos: set[int]) -> list[EpisodePlan]:
    """The next ones to play. A demonstration that failed is replaced by one of a later number."""
    there = _names(job.out)
    tasks = list(job.world.tasks.items())
    plans = []
    for kind, count in job.goals.items():
        prefix = f"{job.dataset(kind)}/"
        indices = range(count)
        if kind is DEMO:
            num_missing = max(0, count - sum(name.startswith(prefix) for name in there))
            open_indices = (i for i in itertools.count() if kind.offset + i not in failed_demos)
            indices = itertools.islice((i for i in open_indices if _name(job, kind, i) not in there), num_missing)
        for index in indices:
            if _name(job, kind, index) in there:
                continue
            task, known = tasks[index % len(tasks)]
            plan = EpisodePlan(
                number=kind.offset + index,
                seed=job.seed + kind.offset + index,
                task=task,
                prompt=known.prompt,
                keeps_pictures=True,
                mode=kind.mode,
                stands_in=job.actor is None,
            )
            plans.append(plan)
    return plans


def _name(job: CollectJob, kind: Kind, index: int) -> str:
    return episode_name(job.dataset(kind), index)


def _label(job: CollectJob, kind: Kind, plan: EpisodePlan) -> Label:
    known = job.world.tasks[plan.task]
    actor = "the scripted expert"
    if job.actor is None and kind is not DEMO:
        actor = "a mediocre expert"
    elif kind is not DEMO:
        actor = f"{job.checkpoint} ({job.checkpoint_hash[:12]})"
    if job.corrector == "keyboard":
        actor += ", corrected at the keyboard"
    return Label(
        dataset=job.dataset(kind),
        index=plan.number - kind.offset,
        source=kind.source,
        task=known.name,
        prompt=known.prompt,
        fps=job.world.spec.fps,
        origin=f"{job.world.spec.name} seed {plan.seed} by {actor}",
    )


def _write_waiting(job: CollectJob, journal: Journal, report: Report) -> None:
    """All waiting episodes become shards, a data set at a time."""
    waiting = journal.waiting()
    there = _names(job.out) if waiting else set()
    # A process that was killed right after it wrote shards left these behind.
    journal.remove([episode for episode in waiting if episode.name in there])
    by_dataset: dict[str, list[Episode]] = {}
    for episode in waiting:
        if episode.name not in there:
            by_dataset.setdefault(episode.name.rpartition("/")[0], []).append(episode)
    for dataset, episodes in by_dataset.items():
        written = write_shards(job.out, episodes, dataset=dataset, seed=job.seed, **job.stored)
        journal.remove(episodes)
        report(f"{len(episodes)} episodes of {dataset} in {', '.join(written.new_shards)}")


def _names(out: Path) -> set[str]:
    """Of the episodes in the shards."""
    return {name for index in _indices(out) for name in index.episodes.tolist()}


def _indices(out: Path) -> Iterator[ShardIndex]:
    if not (out / MANIFEST_NAME).exists():
        return
    for shard in Manifest.load(out).shards:
        yield ShardIndex.load(ShardIndex.path_of(out / shard.name))


def _tally(job: CollectJob) -> dict[str, Tally]:
    outcomes: dict[str, int] = {}
    for index in _indices(job.out):
        names = index.episodes[index.episode].tolist()
        outcomes |= dict(zip(names, index.outcome.tolist(), strict=True))
    tallies = {}
    for kind in job.goals:
        of_kind = [outcome for name, outcome in outcomes.items() if name.startswith(f"{job.dataset(kind)}/")]
        tallies[job.dataset(kind)] = Tally(len(of_kind), of_kind.count(OUTCOME_IDS["success"]))
    return tallies


def _agree_on_record(job: CollectJob) -> None:
    """Who made which data set, and how: with other settings its missing episodes would be of another kind."""
    path = job.out / RECORD_NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for kind in job.goals:
        now, dataset = job.provenance(kind), job.dataset(kind)
        before = record.setdefault(dataset, now)
        if differing := sorted(key for key in now if before.get(key) != now[key]):
            raise UsageError(
                f"{path}: data set '{dataset}' was collected with another {differing[0]} "
                f"({before.get(differing[0])!r}, now {now[differing[0]]!r}); give a new one a --name"
            )
    write_file(path, (json.dumps(record, indent=1) + "\n").encode())
