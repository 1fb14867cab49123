"""The ``meta`` folder of a LeRobot v3.0 data set: features, tasks, and where each episode lies.

meta/info.json                 rate, features, path templates
meta/tasks.parquet             task_index and the task's text (the pandas index, under one of two names)
meta/episodes/*/*.parquet      one row per episode: length, data file, and per camera a video file and a time span in it

Everything that can be told from these files alone is checked here, so that a broken set fails before any work.
Frames are counted from 0 within an episode; rows and videos hold many episodes per file. This file opens no video.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from recap_ds.data.lerobot.tables import one_line, open_parquet, read_table
from recap_ds.errors import UsageError

# The task's text is the pandas index of tasks.parquet: named by newer writers, not by older ones.
TASK_TEXT_COLUMNS = ("task", "__index_level_0__")
VIDEO_PARTS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


@dataclass(frozen=True)
class Camera:
    key: str  # the feature, "observation.images.top"
    name: str  # in our shards, "top"
    stored_as: Literal["video", "image"]
    height: int
    width: int


@dataclass(frozen=True)
class VideoSpan:
    path: Path
    from_seconds: float  # where the episode's frame 0 stands in the file


@dataclass(frozen=True)
class EpisodeEntry:
    index: int
    num_frames: int
    data_path: Path
    videos: dict[str, VideoSpan]  # by camera key


@dataclass(frozen=True)
class DatasetMetadata:
    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    cameras: tuple[Camera, ...]
    left_out_cameras: tuple[str, ...]  # depth maps, which the shards have no place for
    tasks: dict[int, str]
    episodes: tuple[EpisodeEntry, ...]  # by index

    @property
    def num_frames(self) -> int:
        return sum(episode.num_frames for episode in self.episodes)


def load_metadata(root: Path) -> DatasetMetadata:
    info_path = root / "meta" / "info.json"
    info = _read_info(info_path)
    features = info["features"]
    cameras, left_out = _cameras(features, info_path)
    for camera in cameras:
        video_fps = _video_info(features[camera.key]).get("video.fps", info["fps"])
        if video_fps != info["fps"]:
            raise UsageError(
                f"{info_path}: camera {camera.name} runs at {video_fps} fps, the data set at {info['fps']}; "
                f"re-encode the video at the data set's rate"
            )
    return DatasetMetadata(
        root=root,
        fps=float(info["fps"]),
        features=features,
        cameras=cameras,
        left_out_cameras=left_out,
        tasks=_read_tasks(root / "meta" / "tasks.parquet"),
        episodes=_read_episode_entries(root, info, cameras),
    )


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the root of a LeRobot v3.0 data set, the folder that holds meta/")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({one_line(error)})") from error
    version = str(info.get("codebase_version", "unknown")) if isinstance(info, dict) else "unknown"
    if not re.fullmatch(r"v?3(\..*)?", version):
        root = path.parent.parent
        raise UsageError(
            f"{path}: data set format {version}, this importer reads v3.0; convert a v2.1 set in place with "
            f"'python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{root.name} --root={root} "
            f"--push-to-hub=false'"
        )
    for key, kind in (("fps", (int, float)), ("features", dict), ("data_path", str)):
        if not isinstance(info.get(key), kind):
            raise UsageError(f"{path}: {key} is missing or of the wrong type; copy the file again")
    if not all(isinstance(feature, dict) for feature in info["features"].values()):
        raise UsageError(f"{path}: features must map names to objects with dtype and shape; copy the file again")
    if not info["fps"] > 0:
        raise UsageError(f"{path}: fps is {info['fps']}, it must be above 0")
    return info


def _video_info(feature: dict[str, Any]) -> dict[str, Any]:
    # "info" in current writers, "video_info" in sets converted from v2.
    return feature.get("info") or feature.get("video_info") or {}


def _cameras(features: dict[str, dict[str, Any]], info_path: Path) -> tuple[tuple[Camera, ...], tuple[str, ...]]:
    cameras: dict[str, Camera] = {}
    left_out = []
    for key, feature in features.items():
        if feature.get("dtype") not in ("video", "image"):
            continue
        if _video_info(feature).get("video.is_depth_map") or _video_info(feature).get("is_depth_map"):
            left_out.append(key)
            continue
        height, width = _image_sides(key, feature, info_path)
        camera = Camera(key, camera_name(key), feature["dtype"], height, width)
        # Tar readers often lower-case suffixes, so names that differ in case only would collide there.
        other = cameras.setdefault(camera.name.lower(), camera)
        if other is not camera:
            raise UsageError(f"{info_path}: {other.key} and {key} both become camera {camera.name!r}; rename one")
    if not cameras:
        raise UsageError(f"{info_path}: no feature of dtype video or image; a policy here needs at least one camera")
    return tuple(cameras.values()), tuple(left_out)


def camera_name(key: str) -> str:
    """observation.images.wrist.left -> wrist_left, observation.image -> image: member names of a tar split at dots."""
    short = key.removeprefix("observation.").removeprefix("images.")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", short)


def _image_sides(key: str, feature: dict[str, Any], info_path: Path) -> tuple[int, int]:
    """Height and width of [H, W, 3] or [3, H, W]; the names say which, else the place of the 3."""
    shape, names = feature.get("shape"), feature.get("names")
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if not whole or 3 not in (shape[0], shape[2]):
        raise UsageError(
            f"{info_path}: {key} has shape {shape!r}; a camera is [height, width, 3] or [3, height, width], "
            "in whole numbers"
        )
    named = isinstance(names, list) and len(names) == 3
    channels_first = str(names[0]).startswith("channel") if named else shape[2] != 3
    return (shape[1], shape[2]) if channels_first else (shape[0], shape[1])


def _read_tasks(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; the data set is incomplete, copy it again")
    columns = open_parquet(path).schema_arrow.names
    text_column = next((name for name in TASK_TEXT_COLUMNS if name in columns), None)
    if text_column is None:
        raise UsageError(f"{path}: no column {' or '.join(TASK_TEXT_COLUMNS)} with the text of the tasks")
    table = read_table(path, ["task_index", text_column])
    return dict(zip(table["task_index"].to_pylist(), table[text_column].to_pylist(), strict=True))


def _read_episode_entries(root: Path, info: dict[str, Any], cameras: tuple[Camera, ...]) -> tuple[EpisodeEntry, ...]:
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UsageError(f"{folder}: no */*.parquet; the data set is incomplete, copy it again")
    video_keys = [camera.key for camera in cameras if camera.stored_as == "video"]
    columns = [
        "episode_index",
        "length",
        "dataset_from_index",
        "dataset_to_index",
        "data/chunk_index",
        "data/file_index",
    ]
    columns += [f"videos/{key}/{part}" for key in video_keys for part in VIDEO_PARTS]
    rows = [row for path in paths for row in read_table(path, columns).to_pylist()]
    rows.sort(key=lambda row: row["episode_index"])
    entries = tuple(_episode_entry(root, info, row, video_keys) for row in rows)
    _check_episode_entries(entries, info, folder)
    return entries


def _episode_entry(root: Path, info: dict[str, Any], row: dict[str, Any], video_keys: list[str]) -> EpisodeEntry:
    index, length = row["episode_index"], row["length"]
    empty = [name for name, value in row.items() if value is None]
    if empty:
        raise UsageError(f"{root}: episode {index} has no {empty[0]} in meta/episodes; copy the data set again")
    if length < 1 or row["dataset_to_index"] - row["dataset_from_index"] != length:
        raise UsageError(
            f"{root}: episode {index} has length {length} but rows {row['dataset_from_index']} to "
            f"{row['dataset_to_index']} in meta/episodes"
        )
    videos = {}
    for key in video_keys:
        part = {name: row[f"videos/{key}/{name}"] for name in VIDEO_PARTS}
        # Half a frame of slack: durations are rounded by the container.
        num_video_frames = (part["to_timestamp"] - part["from_timestamp"]) * info["fps"]
        if num_video_frames < length - 0.5:
            raise UsageError(
                f"{root}: episode {index} has {length} frames, its video {key} only {num_video_frames:.1f} "
                f"(meta/episodes); record or copy the episode again"
            )
        path = _path_from_template(root, info, "video_path", part, video_key=key)
        videos[key] = VideoSpan(path, part["from_timestamp"])
    data_part = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
    return EpisodeEntry(index, length, _path_from_template(root, info, "data_path", data_part), videos)


def _path_from_template(root: Path, info: dict[str, Any], name: str, part: dict[str, Any], **more: str) -> Path:
    try:
        return root / info[name].format(chunk_index=part["chunk_index"], file_index=part["file_index"], **more)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(f"{root}/meta/info.json: {name} {info.get(name)!r} is not a path template of v3.0") from error


def _check_episode_entries(entries: tuple[EpisodeEntry, ...], info: dict[str, Any], folder: Path) -> None:
    for before, after in pairwise(entries):
        if before.index == after.index:
            raise UsageError(f"{folder}: episode {after.index} stands there twice; copy the data set again")
    for key, found in (
        ("total_episodes", len(entries)),
        ("total_frames", sum(entry.num_frames for entry in entries)),
    ):
        if info.get(key, found) != found:
            raise UsageError(f"{folder}: holds {found} where meta/info.json says {key} {info[key]}; copy it again")
    checked: set[Path] = set()
    for entry in entries:
        for path in (entry.data_path, *(span.path for span in entry.videos.values())):
            if path not in checked and not path.is_file():
                raise UsageError(f"{path}: no such file, episode {entry.index} needs it; copy the data set again")
            checked.add(path)
