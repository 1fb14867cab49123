"""Finished episodes on their way into shards: each in a folder of its own, complete from the moment it has its name.

    OUT/.collected/<data set>-<index>/    episode.json arrays.npz <camera>.npy

Shards are written for many episodes at once, because a shard is shuffled over them. Until then an episode waits here,
and a process that is killed loses only the episodes that were still being played: the next one finds the others.

    T frames   S, A state and action dims   P picture side
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.config import SourceName
from recap_ds.data.episodes import Episode
from recap_ds.files.atomic import sync_folder
from recap_ds.files.lock import hold_folder
from recap_ds.files.records import sync_file
from recap_ds.rollout.episode import PlayedEpisode

JOURNAL_NAME = ".collected"
RECORD_NAME, ARRAYS_NAME = "episode.json", "arrays.npz"


class Label(NamedTuple):
    """What a finished episode is called in the shards."""

    dataset: str
    index: int
    source: SourceName
    task: str
    prompt: str
    fps: float
    origin: str

    @property
    def name(self) -> str:
        return episode_name(self.dataset, self.index)


def episode_name(dataset: str, index: int) -> str:
    return f"{dataset}/{index:06d}"


@dataclass(frozen=True)
class StoredPictures:
    """FrameReader of a waiting episode."""

    folder: Path
    cameras: tuple[str, ...]

    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        return {camera: np.load(self.folder / f"{camera}.npy", mmap_mode="r")[frames] for camera in self.cameras}


@contextmanager
def open_journal(out: Path) -> Iterator["Journal"]:
    """Of the shard folder ``out``, which is made. One collection at a time: a second one is a UsageError."""
    folder = out / JOURNAL_NAME
    with hold_folder(folder, f"--out {out}: another process collects there; wait for it"):
        yield Journal(folder)


class Journal:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # What a killed process was writing; nothing that has its name is touched.
        for unfinished in folder.glob("*.tmp"):
            shutil.rmtree(unfinished)

    def add(self, played: PlayedEpisode, label: Label) -> None:
        """Durable when it returns."""
        assert played.pictures is not None, "the plan kept no pictures"
        final = self._path(label.dataset, label.index)
        work = final.with_name(f"{final.name}.tmp")
        work.mkdir()
        record = {**label._asdict(), "outcome": played.outcome, "cameras": sorted(played.pictures)}
        (work / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        np.savez(
            work / ARRAYS_NAME,
            states=played.states,
            actions=played.actions,
            rewards=played.rewards,
            expert=played.expert,
        )
        for camera, pictures in played.pictures.items():
            np.save(work / f"{camera}.npy", pictures)
        for path in work.iterdir():
            sync_file(path)
        os.replace(work, final)
        sync_folder(self._folder)

    def waiting(self) -> list[Episode]:
        """All of them, by name."""
        return [_read(path) for path in sorted(self._folder.iterdir()) if (path / RECORD_NAME).is_file()]

    def remove(self, episodes: list[Episode]) -> None:
        """``episodes``: now in the shards."""
        for episode in episodes:
            dataset, _, index = episode.name.rpartition("/")
            shutil.rmtree(self._path(dataset, int(index)))

    def _path(self, dataset: str, index: int) -> Path:
        return self._folder / f"{dataset}-{index:06d}"


def _read(folder: Path) -> Episode:
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    outcome, cameras = record.pop("outcome"), tuple(record.pop("cameras"))
    label = Label(**record)
    with np.load(folder / ARRAYS_NAME) as arrays:
        return Episode(
            name=label.name,
            task=label.task,
            prompt=label.prompt,
            source=label.source,
            outcome=outcome,
            fps=label.fps,
            states=arrays["states"],
            actions=arrays["actions"],
            read_frames=StoredPictures(folder, cameras),
            human=arrays["expert"] if label.source == "intervention" else None,
            rewards=arrays["rewards"],
            origin=label.origin,
        )
