"""LeRobot data sets as ``Episode`` objects, one at a time.

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
from recap_ds.data.lerobot.recorded import REWARD_COLUMN
from recap_ds.data.lerobot.rows import EpisodeRows, read_rows
from recap_ds.data.lerobot.tables import as_flags
from recap_ds.errors import UsageError


@dataclass(frozen=True)
class ImportOptions:
    source: SourceName
    name: str  # of the data set, in episode names
    state_keys: tuple[str, ...] = ("observation.state",)  # columns, concatenated
    action_keys: tuple[str, ...] = ("action",)  # columns, concatenated
    task: str | None = None  # of every episode; None = as meta/tasks says
    labels: Path | None = None  # CSV of outcomes
    success_progress: float | None = None  # of SARM, from which on an episode succeeded; None = it is not asked
    fps: float | None = None  # resample to this rate; None keeps the native one
    absolute_actions: bool = False  # an action is a target, not a change: only then may frames be dropped
    delta_dims: tuple[int, ...] = ()  # of absolute actions, stored as the change from the state of the same frame


def read_episodes(metadata: DatasetMetadata, options: ImportOptions) -> Iterator[Episode]:
    _check_rate(metadata, options)
    _check_features(metadata, options)
    outcomes = read_outcomes(metadata, options.source, options.labels, options.success_progress)
    # Numbers are cheap next to pictures: an hour of decoding shall not end at a NaN in the last episode.
    for _ in _episodes(metadata, options, outcomes):
        pass
    return _episodes(metadata, options, outcomes)


def _check_rate(metadata: DatasetMetadata, options: ImportOptions) -> None:
    if options.delta_dims and not options.absolute_actions:
        raise UsageError("--delta-actions turns targets into changes; add --absolute-actions if actions are targets")
    if options.delta_dims and options.fps is not None:
        raise UsageError("--delta-actions and --fps: frames of changes cannot be dropped; give one of them")
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
    for flag, names, prefix in (
        ("--state-keys", options.state_keys, "observation."),
        ("--action-keys", options.action_keys, "action"),
    ):
        for name in names:
            if name not in metadata.features or _is_camera(metadata, name):
                numeric = [key for key in metadata.features if key.startswith(prefix) and not _is_camera(metadata, key)]
                raise UsageError(
                    f"{where}: no feature {name} of numbers; choose with {flag} from: {', '.join(numeric) or 'none'}"
                )
    if options.source == "intervention" and human_column(metadata) is None:
        raise UsageError(
            f"{where}: no column tells who acts ({', '.join(HUMAN_COLUMNS)}), which --source intervention needs; "
            f"record it, or import the set as demo or auto"
        )


def _is_camera(metadata: DatasetMetadata, key: str) -> bool:
    return metadata.features[key].get("dtype") in ("video", "image")


def _episodes(metadata: DatasetMetadata, options: ImportOptions, outcomes: dict[int, str]) -> Iterator[Episode]:
    optional = [name for name in (REWARD_COLUMN, human_column(metadata)) if name in metadata.features]
    columns = [*options.state_keys, *options.action_keys, "task_index", "timestamp", *optional]
    for rows in read_rows(metadata, list(dict.fromkeys(columns))):
        yield _episode(metadata, options, rows, outcomes[rows.entry.index])


def _episode(metadata: DatasetMetadata, options: ImportOptions, rows: EpisodeRows, outcome: str) -> Episode:
    name = f"{options.name}/{rows.entry.index}"
    step = metadata.fps / (options.fps or metadata.fps)
    # The kept native frames: all of them without --fps, fewer with it.
    native = nearest_native_frames(np.arange(rows.entry.num_frames), step)
    native = native[native < rows.entry.num_frames]
    states = _features(metadata, rows, options.state_keys, name)
    actions = _features(metadata, rows, options.action_keys, name)
    if options.delta_dims:
        actions = _as_changes(actions, states, options.delta_dims, name)
    rewards = _numbers(metadata, rows, REWARD_COLUMN, name)[:, 0] if REWARD_COLUMN in rows.columns else None
    human_name = human_column(metadata)
    human = None
    if human_name is not None:
        flags = as_flags(rows.columns[human_name], human_name, rows.entry.data_path)
        human = human_mask(flags, options.source, name)
    _check_timestamps(metadata, rows, name)
    task = options.task or _task(metadata, rows, name)
    return Episode(
        name=name,
        task=task,
        prompt=task,
        source=options.source,
        outcome=outcome,
        fps=options.fps or metadata.fps,
        states=states[native],
        actions=actions[native],
        read_frames=_frame_reader(metadata, rows, name, step),
        human=None if human is None else human[native],
        # A reward between two kept frames belongs to the first of them: none is lost.
        rewards=None if rewards is None else np.add.reduceat(rewards, native),
        origin=f"{metadata.root.resolve().name}, LeRobot {metadata.version}, episode {rows.entry.index}",
    )


def _features(metadata: DatasetMetadata, rows: EpisodeRows, keys: tuple[str, ...], name: str) -> np.ndarray:
    return np.concatenate([_numbers(metadata, rows, key, name) for key in keys], axis=1)


def _as_changes(actions: np.ndarray, states: np.ndarray, dims: tuple[int, ...], name: str) -> np.ndarray:
    """[T, A]: target minus where the robot is, in ``dims``, which mean the same joint in states and actions."""
    narrower = min(actions.shape[1], states.shape[1])
    if max(dims) >= narrower:
        raise UsageError(
            f"episode {name}: --delta-actions {max(dims)}: there are {actions.shape[1]} action and {states.shape[1]} "
            f"state dims, so 0 to {narrower - 1} can be taken as changes"
        )
    changes = actions.copy()
    changes[:, dims] -= states[:, dims]
    return changes


def _numbers(metadata: DatasetMetadata, rows: EpisodeRows, key: str, name: str) -> np.ndarray:
    """[T, D] float32 of a feature, finite and as wide as meta/info.json says."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is named below
        values = rows.columns[key].astype(np.float32)
    shape = metadata.features[key].get("shape") or [1]
    if shape != [values.shape[1]]:
        raise UsageError(
            f"episode {name}: {key} has {values.shape[1]} numbers per frame, meta/info.json says shape {shape}"
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
        raise UsageError(f"episode {name}: has tasks {indices}; RECAP needs one task per episode: give one with --task")
    if indices[0] not in metadata.tasks:
        raise UsageError(f"episode {name}: task_index {indices[0]} is not in meta/tasks")
    text = metadata.tasks[indices[0]]
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"episode {name}: task {indices[0]} has no text in meta/tasks; give it one with --task")
    return text


def _frame_reader(metadata: DatasetMetadata, rows: EpisodeRows, name: str, step: float) -> EpisodeFrames:
    readers: list[VideoFrames | ParquetFrames] = []
    for camera in metadata.cameras:
        if camera.stored_as == "video":
            span = rows.entry.videos[camera.key]
            readers.append(VideoFrames(camera, str(span.path), span.from_seconds, metadata.fps))
        else:
            readers.append(ParquetFrames(camera, str(rows.entry.data_path), rows.first_row, str(metadata.root)))
    return EpisodeFrames(name, tuple(readers), step)
