"""Finished episodes on their way into shards: each in a folder of its own, complete from the moment it has its name.

    OUT/.collected/<data set>-<index>/    episode.json arrays.npz <camera>.npy
    OUT/.set_aside/<data set>-<index>/    those that could not become shards of OUT

Shards are written for many episodes at once, because a shard is shuffled over them. Until then an episode waits here,
and a process that is killed loses only the episodes that were still being played: the next one finds the others. That
may be another command, so an episode brings along all that it is and follows from.

    T frames   S, A state and action dims   P picture side
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recap_ds.config import SourceName
from recap_ds.data.checks import check_episode
from recap_ds.data.episodes import Episode
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.lock import hold_folder
from recap_ds.files.records import sync_file
from recap_ds.rollout.episode import PlayedEpisode

JOURNAL_NAME, SET_ASIDE_NAME = ".collected", ".set_aside"
RECORD_NAME, ARRAYS_NAME = "episode.json", "arrays.npz"
# What reading a file that is cut off, changed or of another version may raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


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


class WaitingEpisode(NamedTuple):
    dataset: str
    episode: Episode
    settings: dict[str, Any]  # all that it follows from (``CollectJob.provenance``)
    cameras: tuple[str, ...]
    image_size: int  # P


class DamagedEpisode(Exception):
    """A waiting episode cannot be read; the message says why."""


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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: no folder can be made there ({error.strerror})") from None
    with hold_folder(out / JOURNAL_NAME, f"--out {out}: another process collects there; wait for it"):
        yield Journal(out)


class Journal:
    def __init__(self, out: Path) -> None:
        self._folder, self.aside = out / JOURNAL_NAME, out / SET_ASIDE_NAME
        # What a killed process was writing; nothing that has its name is touched.
        for unfinished in self._folder.glob("*.tmp"):
            shutil.rmtree(unfinished)

    def add(self, played: PlayedEpisode, label: Label, settings: dict[str, Any]) -> None:
        """Durable when it returns. RunFailed where the world gave numbers that no shard holds."""
        assert played.pictures is not None, "the plan kept no pictures"
        final = self._folder / _folder_name(label)
        work = final.with_name(f"{final.name}.tmp")
        cameras = tuple(sorted(played.pictures))
        arrays = {name: getattr(played, name) for name in ("states", "actions", "rewards", "expert")}
        try:
            check_episode(_episode(label, played.outcome, arrays, StoredPictures(work, cameras)), label.dataset)
        except UsageError as error:
            raise RunFailed(f"{label.origin}: {error}; that is the environment's or the policy's doing") from None
        record = {**label._asdict(), "outcome": played.outcome, "cameras": cameras, "settings": settings}
        try:
            work.mkdir()
            (work / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            np.savez(work / ARRAYS_NAME, **arrays)
            for camera, pictures in played.pictures.items():
                np.save(work / f"{camera}.npy", pictures)
            for path in work.iterdir():
                sync_file(path)
            os.replace(work, final)
            sync_folder(self._folder)
        except OSError as error:
            raise RunFailed(f"{work}: {error}; mend that and start again") from error

    def names(self) -> list[str]:
        """Of the folders of waiting episodes; not of one that was being written when we were interrupted."""
        return sorted(path.name for path in self._folder.iterdir() if path.is_dir() and path.suffix != ".tmp")

    def read(self, name: str) -> WaitingEpisode:
        """DamagedEpisode where it is not what was written."""
        try:
            waiting = _read(self._folder / name)
            check_episode(waiting.episode, waiting.dataset)
        except READ_ERRORS as error:
            raise DamagedEpisode(f"cannot be read ({_in_words(error)})") from None
        return waiting

    def waiting(self) -> list[WaitingEpisode]:
        """All of them, by name."""
        return [self.read(name) for name in self.names()]

    def set_aside(self, name: str) -> None:
        """Out of the way, into a folder where nobody looks for episodes; whatever was there under the name stays."""
        self.aside.mkdir(exist_ok=True)
        target, number = self.aside / name, 1
        while target.exists():
            number += 1
            target = self.aside / f"{name}.{number}"
        os.replace(self._folder / name, target)
        sync_folder(self.aside)
        sync_folder(self._folder)

    def remove(self, waiting: list[WaitingEpisode]) -> None:
        """``waiting``: now in the shards."""
        for each in waiting:
            _, _, index = each.episode.name.rpartition("/")
            shutil.rmtree(self._folder / f"{each.dataset}-{index}")


def _folder_name(label: Label) -> str:
    return f"{label.dataset}-{label.index:06d}"


def _in_words(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}"


def _read(folder: Path) -> WaitingEpisode:
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    outcome, cameras, settings = record.pop("outcome"), tuple(record.pop("cameras")), record.pop("settings")
    label = Label(**record)
    if _folder_name(label) != folder.name or not cameras or not isinstance(settings, dict) or "seed" not in settings:
        raise ValueError(f"{RECORD_NAME} is of another episode")
    with np.load(folder / ARRAYS_NAME) as stored:
        arrays = {name: stored[name] for name in ("states", "actions", "rewards", "expert")}
    for camera in cameras:
        pictures = np.load(folder / f"{camera}.npy", mmap_mode="r")
        side = pictures.shape[1]
        if pictures.dtype != np.uint8 or pictures.shape != (len(arrays["states"]), side, side, 3):
            raise ValueError(f"{camera}.npy: {pictures.dtype} {list(pictures.shape)}")
    episode = _episode(label, outcome, arrays, StoredPictures(folder, cameras))
    return WaitingEpisode(label.dataset, episode, settings, cameras, image_size=side)


def _episode(label: Label, outcome: str, arrays: dict[str, np.ndarray], read_frames: StoredPictures) -> Episode:
    return Episode(
        name=label.name,
        task=label.task,
        prompt=label.prompt,
        source=label.source,
        outcome=outcome,
        fps=label.fps,
        states=arrays["states"],
        actions=arrays["actions"],
        read_frames=read_frames,
        human=arrays["expert"] if label.source == "intervention" else None,
        rewards=arrays["rewards"],
        origin=label.origin,
    )
