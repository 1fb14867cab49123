"""LeRobot v3.0 data sets as ``Episode`` objects, one at a time.

``read_episodes`` first checks every number and outcome, then yields lazily: the numbers of one data file are in memory,
images are read by the shard writer through ``Episode.read_frames``. T = frames of an episode.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.config import SourceName
from recap_ds.data.episodes import Episode
from recap_ds.data.lerobot.frames import EpisodeFrames, ParquetFrames, VideoFrames, nearest_native_frames
from recap_ds.data.lerobot.metadata import DatasetMetadata
from recap_ds.data.lerobot.outcomes import HUMAN_COLUMNS, human_column, human_mask, read_outcomes
from recap_ds.data.lerobot.rows import EpisodeRows, read_rows
from recap_ds.data.lerobot.tables import as_flags
from recap_ds.errors import UsageError

ACTION = "action"
REWARD = "next.reward"


@dataclass(frozen=True)
class ImportOptions:
    source: SourceName
    name: str  # of the data set, in episode names
    state_keys: tuple[str, ...] = ("observation.state",)  # columns, concatenated
    labels: Path | None = None  # CSV of outcomes
    fps: float | None = None  # resample to this rate; None keeps the native one
    absolute_actions: bool = False  # an action is a target, not a change: only then may frames be dropped


def read_episodes(metadata: DatasetMetadata, options: ImportOptions) -> Iterator[Episode]:
    _check_rate(metadata, options)
    _check_features(metadata, options)
    outcomes = read_outcomes(metadata, options.source, options.labels)
    # Numbers are cheap next to pictures: an hour of decoding shall not end at a NaN in the last episode.
    for _ in _episodes(metadata, options, outcomes):
        pass
    return _episodes(metadata, options, outcomes)


def _check_rate(metadata: DatasetMetadata, options: ImportOptions) -> None:
    if options.fps is None:
        return
    if not options.absolute_actions:
        raise UsageError(
            "--fps drops actions, which changes the motion of a delta controller; add --absolute-actions if an action "
            "here is a target position, or use --stride"
        )
    if not 0 < options.fps <= metadata.fps:
        raise UsageError(f"--fps {options.fps:g}: it must be above 0 and at most the data set's {metadata.fps:g}")


def _check_features(metadata: DatasetMetadata, options: ImportOptions) -> None:
    where = metadata.root / "meta" / "info.json"
    for name in options.state_keys:
        if name not in metadata.features:
            numeric = [
                key for key in metadata.features if key.startswith("observation.") and not _is_camera(metadata, key)
            ]
            raise UsageError(
                f"{where}: no feature {name}; choose with --state-keys from: {', '.join(numeric) or 'none'}"
            )
    if ACTION not in metadata.features:
        raise UsageError(f"{where}: no feature {ACTION}; rename the column that holds the actions")
    if options.source == "intervention" and human_column(metadata) is None:
        raise UsageError(
            f"{where}: no column tells who acts ({', '.join(HUMAN_COLUMNS)}), which --source intervention needs; "
            f"record it, or import the set as demo or auto"
        )


def _is_camera(metadata: DatasetMetadata, key: str) -> bool:
    return metadata.features[key].get("dtype") in ("video", "image")


def _episodes(metadata: DatasetMetadata, options: ImportOptions, outcomes: dict[int, str]) -> Iterator[Episode]:
    optional = [name for name in (REWARD, human_column(metadata)) if name is not None and name in metadata.features]
    columns = [*dict.fromkeys(options.state_keys), ACTION, "task_index", "timestamp", *optional]
    for rows in read_rows(metadata, columns):
        yield _episode(metadata, options, rows, outcomes[rows.entry.index])


def _episode(metadata: DatasetMetadata, options: ImportOptions, rows: EpisodeRows, outcome: str) -> Episode:
    name = f"{options.name}/{rows.entry.index}"
    step = metadata.fps / (options.fps or metadata.fps)
    # The kept native frames: all of them without --fps, fewer with it.
    native = nearest_native_frames(np.arange(rows.entry.num_frames), step)
    native = native[native < rows.entry.num_frames]
    states = np.concatenate([_numbers(metadata, rows, key, name) for key in options.state_keys], axis=1)
    rewards = _numbers(metadata, rows, REWARD, name)[:, 0] if REWARD in rows.columns else None
    human_name = human_column(metadata)
    human = None
    if human_name is not None:
        flags = as_flags(rows.columns[human_name], human_name, rows.entry.data_path)
        human = human_mask(flags, options.source, name)
    _check_timestamps(metadata, rows, name)
    task = _task(metadata, rows, name)
    return Episode(
        name=name,
        task=task,
        prompt=task,
        source=options.source,
        outcome=outcome,
        fps=options.fps or metadata.fps,
        states=states[native],
        actions=_numbers(metadata, rows, ACTION, name)[native],
        read_frames=_frame_reader(metadata, rows, name, step),
        human=None if human is None else human[native],
        # A reward between two kept frames belongs to the first of them: none is lost.
        rewards=None if rewards is None else np.add.reduceat(rewards, native),
        origin=f"{metadata.root.resolve().name}, LeRobot v3.0, episode {rows.entry.index}",
    )


def _numbers(metadata: DatasetMetadata, rows: EpisodeRows, key: str, name: str) -> np.ndarray:
    """[T, D] float32 of a feature, finite and as wide as meta/info.json says."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is named below
        values = rows.columns[key].astype(np.float32)
    shape = metadata.features[key].get("shape") or [1]
    if len(shape) != 1 or values.shape[1] != shape[0]:
        raise UsageError(
            f"episode {name}: {key} has {values.shape[1]} numbers per frame, meta/info.json says shape {list(shape)}"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, dim = bad[0].tolist()
        raise UsageError(
            f"episode {name}, frame {frame}: {key}[{dim}] is {values[frame, dim]}; remove or repair the episode"
        )
    return values


def _check_timestamps(metadata: DatasetMetadata, rows: EpisodeRows, name: str) -> None:
    """Frames are found by frame / fps; a column that says otherwise would pair images with other frames' actions."""
    timestamps = rows.columns["timestamp"][:, 0]
    expected = np.arange(len(timestamps)) / metadata.fps
    wrong = np.flatnonzero(~(np.abs(timestamps - expected) <= 0.5 / metadata.fps))
    if len(wrong):
        frame = int(wrong[0])
        raise UsageError(
            f"episode {name}, frame {frame}: timestamp {timestamps[frame]:.4f} s, at {metadata.fps:g} fps it should be "
            f"{expected[frame]:.4f} s; record at a constant rate or correct fps in meta/info.json"
        )


def _task(metadata: DatasetMetadata, rows: EpisodeRows, name: str) -> str:
    indices = np.unique(rows.columns["task_index"]).tolist()
    if len(indices) != 1:
        raise UsageError(f"episode {name}: has tasks {indices}; RECAP needs one task per episode, split it first")
    if indices[0] not in metadata.tasks:
        raise UsageError(f"episode {name}: task_index {indices[0]} is not in meta/tasks.parquet")
    return metadata.tasks[indices[0]]


def _frame_reader(metadata: DatasetMetadata, rows: EpisodeRows, name: str, step: float) -> EpisodeFrames:
    readers: list[VideoFrames | ParquetFrames] = []
    for camera in metadata.cameras:
        if camera.stored_as == "video":
            span = rows.entry.videos[camera.key]
            readers.append(VideoFrames(camera, str(span.path), span.from_seconds, metadata.fps))
        else:
            readers.append(ParquetFrames(camera, str(rows.entry.data_path), rows.first_row, str(metadata.root)))
    return EpisodeFrames(name, tuple(readers), step)
