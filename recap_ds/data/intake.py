"""Episodes on their way in: checked one by one, against each other and against what the folder already holds.

Spooling starts with the first episode, long before the last one is known, so every fault is raised as early as it
shows. n = samples of one episode.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.checks import EpisodeArrays, check_episode
from recap_ds.data.episodes import Episode
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import check_agreement
from recap_ds.data.spool import Spool, SpoolJob
from recap_ds.data.staging import Staging
from recap_ds.data.windows import Windows, sample_windows
from recap_ds.errors import UsageError


@dataclass(frozen=True)
class StoredFormat:
    """How this import is stored."""

    action_width: int
    td_horizon: int
    image_size: int
    store_next: bool
    stride: int
    samples_per_shard: int
    absent_cameras: tuple[str, ...] = ()  # which the folder's other data sets have and this one lacks


@dataclass(frozen=True)
class Take:
    """One checked episode, waiting to be written."""

    episode: Episode
    arrays: EpisodeArrays
    windows: Windows
    source: np.ndarray  # [n] int8, source id of every sample


def check_format(layout: StoredFormat) -> None:
    for name in ("action_width", "td_horizon", "image_size", "stride", "samples_per_shard"):
        if getattr(layout, name) < 1:
            raise UsageError(f"{name}: {getattr(layout, name)} is too small; give at least 1")
    if layout.action_width < layout.td_horizon:
        raise UsageError(
            f"action_width: {layout.action_width} is under td_horizon {layout.td_horizon}; "
            "Q is shown every action of its window"
        )


class Intake:
    """Checks episodes one by one against each other and against what the folder already holds."""

    def __init__(self, staging: Staging, layout: StoredFormat, dataset: str, resumable: bool = False) -> None:
        self.takes: list[Take] = []
        self.unknown_outcomes: list[str] = []
        self.prompts: dict[str, str] = {}
        # What every episode here must share; the keys are the manifest's.
        self.shared: dict[str, object] = {}
        self._staging = staging
        self._layout = layout
        self._dataset = dataset
        self._resumable = resumable
        self._names: set[str] = set()
        if staging.manifest:
            self.prompts = {name: task.prompt for name, task in staging.manifest.tasks.items()}
            for shard in staging.manifest.shards:
                self._names.update(ShardIndex.load(ShardIndex.path_of(staging.folder / shard.name)).episodes.tolist())

    def jobs(self, episodes: Iterable[Episode]) -> Iterator[SpoolJob]:
        layout = self._layout
        for episode in episodes:
            arrays = check_episode(episode, self._dataset)
            self._check_identity(episode)
            self._check_shared(episode, arrays)
            if episode.source != "demo" and episode.outcome == "unknown":
                self.unknown_outcomes.append(episode.name)
            if self.unknown_outcomes:
                continue  # only to list them all: nothing will be written
            ends_task = episode.outcome in ("success", "failure")
            windows = sample_windows(arrays.human, ends_task, layout.td_horizon, layout.stride)
            number = len(self.takes)
            self.takes.append(Take(episode, arrays, windows, _sources(episode, windows)))
            frames = windows.frame
            if layout.store_next:
                frames = np.union1d(frames, (windows.frame + windows.next_offset)[windows.needs_next])
            path = self._staging.work / f"{number:08d}.spool"
            yield SpoolJob(episode.name, number, episode.read_frames, frames, layout.image_size, path, self._resumable)

    def check_cameras(self, spool: Spool) -> None:
        absent, manifest = self._layout.absent_cameras, self._staging.manifest
        cameras = tuple(sorted({*spool.cameras, *absent}))
        first = self.shared.setdefault("cameras", cameras)
        if cameras != first:
            name = self.takes[spool.number].episode.name
            raise UsageError(f"episode {name}: cameras are {list(spool.cameras)}, other episodes have {list(first)}")
        if both := set(absent).intersection(spool.cameras):
            raise UsageError(f"--camera {min(both)}=none: this data set has a camera of that name")
        if absent and manifest is None:
            raise UsageError(f"--camera {absent[0]}=none: import a data set that has this camera first")
        if manifest:
            check_agreement(self._staging.folder, manifest, {"cameras": cameras})

    def _check_identity(self, episode: Episode) -> None:
        if episode.name in self._names:
            raise UsageError(
                f"episode {episode.name} is already in {self._staging.folder}: a data set is imported once; "
                "give this one another name, or import into another folder"
            )
        self._names.add(episode.name)
        prompt = self.prompts.setdefault(episode.task, episode.prompt)
        if prompt != episode.prompt:
            raise UsageError(
                f"episode {episode.name}: task '{episode.task}' has the prompt {prompt!r}, not {episode.prompt!r}; "
                "a task has one prompt"
            )

    def _check_shared(self, episode: Episode, arrays: EpisodeArrays) -> None:
        now = {
            "state_dim": arrays.states.shape[1],
            "action_dim": arrays.actions.shape[1],
            "action_width": self._layout.action_width,
            "fps": float(episode.fps),
            "td_horizon": self._layout.td_horizon,
            "image_size": self._layout.image_size,
            "has_next": self._layout.store_next,
        }
        for key, value in now.items():
            first = self.shared.setdefault(key, value)
            if value != first:
                raise UsageError(f"episode {episode.name}: {key} is {value}, earlier episodes have {first}")
        if self._staging.manifest:
            check_agreement(self._staging.folder, self._staging.manifest, now)


def _sources(episode: Episode, windows: Windows) -> np.ndarray:
    """Who controls a frame decides, in an intervention data set, what it teaches."""
    if episode.source != "intervention":
        return np.full(len(windows.frame), SOURCE_IDS[episode.source], dtype=np.int8)
    return np.where(windows.human, SOURCE_IDS["intervention"], SOURCE_IDS["auto"]).astype(np.int8)
