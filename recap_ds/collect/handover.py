"""Waiting episodes become shards of OUT, and those that cannot are set aside.

Whoever comes next writes what a killed process left, under the settings it was collected with. But a folder of shards
holds one format: an episode of other cameras, dims or pictures, or of other settings than the data set that is there,
and one that cannot be read, goes into OUT/.set_aside, so that it neither joins nor blocks the others.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.collect.job import CollectJob
from recap_ds.collect.journal import DamagedEpisode, Journal, WaitingEpisode
from recap_ds.collect.record import CollectionRecord, Settings, describe_difference
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.data.writer import write_shards

Report = Callable[[str], None]


def take_over(job: CollectJob, journal: Journal, record: CollectionRecord, report: Report) -> None:
    """Before anything is played: what was left is written or set aside, once it is sure that ``job`` may collect."""
    in_shards = {name.rpartition("/")[0] for name in names_in_shards(job.out)}
    reasons: dict[tuple[str, str], list[str]] = {}
    sound: list[tuple[str, WaitingEpisode]] = []
    for name in journal.names():
        try:
            sound.append((name, journal.read(name)))
        except DamagedEpisode as damage:
            reasons.setdefault((name.rpartition("-")[0], str(damage)), []).append(name)
    bound = in_shards | {waiting.dataset for _, waiting in sound if record.of(waiting.dataset) is not None}
    for kind in job.goals:
        if job.dataset(kind) in bound:
            record.check(job.dataset(kind), job.provenance(kind))
    known = _Known.of(job, record, bound)
    for name, waiting in sound:
        if why := known.why_not(waiting):
            reasons.setdefault((waiting.dataset, why), []).append(name)
    for (dataset, why), names in reasons.items():
        for name in names:
            journal.set_aside(name)
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more of {dataset}"
        report(f"{which}, left by an earlier collection: {why}; set aside in {journal.aside}")
    write_waiting(job, journal, record, report)


def write_waiting(job: CollectJob, journal: Journal, record: CollectionRecord, report: Report) -> None:
    """All waiting episodes become shards, a data set at a time."""
    waiting = journal.waiting()
    there = names_in_shards(job.out) if waiting else set()
    # A process that was killed right after it wrote shards left these behind.
    journal.remove([each for each in waiting if each.episode.name in there])
    by_dataset: dict[str, list[WaitingEpisode]] = {}
    for each in waiting:
        if each.episode.name not in there:
            by_dataset.setdefault(each.dataset, []).append(each)
    for dataset, group in by_dataset.items():
        settings = group[0].settings
        record.set(dataset, settings)
        episodes = [each.episode for each in group]
        written = write_shards(job.out, episodes, dataset=dataset, seed=settings["seed"], **job.stored)
        journal.remove(group)
        report(f"{len(group)} episodes of {dataset} in {', '.join(written.new_shards)}")


def names_in_shards(out: Path) -> set[str]:
    """Of the episodes."""
    return {name for index in indices(out) for name in index.episodes.tolist()}


def indices(out: Path) -> Iterator[ShardIndex]:
    if not (out / MANIFEST_NAME).exists():
        return
    for shard in Manifest.load(out).shards:
        yield ShardIndex.load(ShardIndex.path_of(out / shard.name))


class _Known(NamedTuple):
    """What whoever joins the shards of OUT has to agree with."""

    layout: dict[str, Any]
    prompts: dict[str, str]  # by task
    settings: dict[str, Settings]  # by data set

    @classmethod
    def of(cls, job: CollectJob, record: CollectionRecord, bound: set[str]) -> "_Known":
        """``bound``: the data sets whose record holds."""
        prompts = {task.name: task.prompt for task in job.world.tasks.values()}
        if (job.out / MANIFEST_NAME).exists():
            prompts |= {name: task.prompt for name, task in Manifest.load(job.out).tasks.items()}
        settings = {job.dataset(kind): job.provenance(kind) for kind in job.goals}
        settings |= {dataset: found for dataset in bound if (found := record.of(dataset)) is not None}
        return cls(job.layout, prompts, settings)

    def why_not(self, waiting: WaitingEpisode) -> str:
        """'' where nothing keeps an episode out; then the next ones have to agree with it as well."""
        episode = waiting.episode
        own = {
            "cameras": waiting.cameras,
            "state_dim": episode.states.shape[1],
            "action_dim": episode.actions.shape[1],
            "fps": episode.fps,
            "image_size": waiting.image_size,
        }
        for key, here in self.layout.items():
            if own[key] != here:
                return f"{key} is {own[key]!r} there but {here!r} here"
        if differing := describe_difference(waiting.settings, self.settings.get(waiting.dataset, waiting.settings)):
            return f"'{waiting.dataset}' is collected with another {differing}"
        told = self.prompts.get(episode.task, episode.prompt)
        if told != episode.prompt:
            return f"task '{episode.task}' has the prompt {episode.prompt!r} there but {told!r} here"
        self.prompts[episode.task], self.settings[waiting.dataset] = told, waiting.settings
        return ""
