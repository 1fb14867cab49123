"""Counts of a shard folder from its indices alone, and the manifest around them.

Used after writing and by ``recap-ds shards index``, so that both say the same of the same tars.
n = samples over all shards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import SOURCES
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import SourceCounts, TaskEntry


class _Columns(NamedTuple):
    """All shards' samples end to end; task and episode are global ids."""

    task_names: np.ndarray
    task: np.ndarray  # [n]
    episode: np.ndarray  # [n]
    source: np.ndarray  # [n]
    frame: np.ndarray  # [n]
    num_valid: np.ndarray  # [n]
    episode_length: np.ndarray  # [n]
    outcome: np.ndarray  # [n]
    control: np.ndarray  # [n]


def count_tasks(indices: Sequence[ShardIndex], prompts: dict[str, str], known: Sequence[str]) -> dict[str, TaskEntry]:
    """Tasks of ``known`` first, in that order, then new ones by name: a task keeps its id when data is added."""
    columns = _columns(indices)
    entries = {}
    for task_id, name in enumerate(columns.task_names.tolist()):
        mine = columns.task == task_id
        episodes = len(np.unique(columns.episode[mine]))
        longest = int(columns.episode_length[mine].max())
        entries[name] = TaskEntry(prompt=prompts[name], longest=longest, episodes=episodes)
    order = [name for name in known if name in entries] + sorted(entries.keys() - set(known))
    return {name: entries[name] for name in order}


def count_sources(indices: Sequence[ShardIndex]) -> dict[str, SourceCounts]:
    """Only sources that have samples, in the order of SOURCES."""
    columns = _columns(indices)
    counts = {}
    for source in SOURCES:
        rows = np.flatnonzero(columns.source == SOURCE_IDS[source])
        if len(rows):
            counts[source] = _count_source(columns, rows)
    return counts


def _count_source(columns: _Columns, rows: np.ndarray) -> SourceCounts:
    # The first frame of every run under one control is a sample, whatever the stride: run lengths are exact.
    ends = columns.frame[rows] + columns.num_valid[rows]
    runs, run = np.unique(np.stack([columns.episode[rows], ends]), axis=1, return_inverse=True)
    run = run.reshape(-1)
    first_frame = runs[1].copy()
    np.minimum.at(first_frame, run, columns.frame[rows])
    frames = runs[1] - first_frame
    human = np.zeros(len(frames), dtype=bool)
    human[run] = columns.control[rows] == CONTROL_IDS["human"]
    episodes, first_row = np.unique(columns.episode[rows], return_index=True)
    outcomes = columns.outcome[rows][first_row]
    return SourceCounts(
        samples=len(rows),
        frames=int(frames.sum()),
        episodes=len(episodes),
        human_frames=int(frames[human].sum()),
        outcomes={name: int((outcomes == value).sum()) for name, value in OUTCOME_IDS.items()},
    )


def _columns(indices: Sequence[ShardIndex]) -> _Columns:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(index, name) for index in indices]).astype(np.int64)

    def global_ids(table: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        names = np.unique(np.concatenate([getattr(index, table) for index in indices]))
        ids = [np.searchsorted(names, getattr(index, table))[getattr(index, column)] for index in indices]
        return names, np.concatenate(ids)

    task_names, task = global_ids("tasks", "task")
    _, episode = global_ids("episodes", "episode")
    plain = ("source", "frame", "num_valid", "episode_length", "outcome", "control")
    return _Columns(task_names, task, episode, *(joined(name) for name in plain))
