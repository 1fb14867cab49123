"""What a folder holds of the data sets of a collection."""

from typing import NamedTuple

import numpy as np

from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS
from recap_ds.collect.handover import indices
from recap_ds.collect.job import DEMO, CollectJob, Kind


class Tally(NamedTuple):
    num_episodes: int
    num_successes: int
    num_frames: int
    num_takeovers: int
    num_human_frames: int
    num_tries: int  # episodes that were played for these; more only of demonstrations


def tally_collection(job: CollectJob) -> dict[str, Tally]:
    """By data set."""
    outcomes: dict[str, dict[int, int]] = {job.dataset(kind): {} for kind in job.goals}
    lengths: dict[str, dict[int, int]] = {dataset: {} for dataset in outcomes}
    human: dict[str, set[tuple[int, int]]] = {dataset: set() for dataset in outcomes}
    for index in indices(job.out):
        names = [name.rpartition("/") for name in index.episodes.tolist()]
        mine = np.array([dataset in outcomes for dataset, _, _ in names])
        for row in np.flatnonzero(mine[index.episode]).tolist():
            dataset, _, number = names[index.episode[row]]
            outcomes[dataset][int(number)] = int(index.outcome[row])
            lengths[dataset][int(number)] = int(index.episode_length[row])
            if index.control[row] == CONTROL_IDS["human"]:
                human[dataset].add((int(number), int(index.frame[row])))
    tallies = {}
    for kind in job.goals:
        dataset = job.dataset(kind)
        frames = human[dataset]
        tallies[dataset] = Tally(
            num_episodes=len(outcomes[dataset]),
            num_successes=list(outcomes[dataset].values()).count(OUTCOME_IDS["success"]),
            num_frames=sum(lengths[dataset].values()),
            num_takeovers=sum((number, frame - 1) not in frames for number, frame in frames),
            num_human_frames=len(frames),
            num_tries=_num_tries(job, kind, list(outcomes[dataset])),
        )
    return tallies


def _num_tries(job: CollectJob, kind: Kind, numbers: list[int]) -> int:
    """A demonstration that fails is replaced by its task's next number, until one succeeds: the last of each task says
    how many it took."""
    if kind is not DEMO:
        return len(numbers)
    num_tasks = len(job.world.tasks)
    last = {number % num_tasks: number for number in sorted(numbers)}
    return sum(number // num_tasks + 1 for number in last.values())
