"""The ``meta`` folder of a LeRobot data set, v3.0 or v2.1: features, tasks, and where each episode lies.

meta/info.json holds rate, features and path templates in both versions; ``layout_v3.py`` and ``layout_v2.py`` read the
rest. Everything that can be told from these files alone is checked here, so that a broken set fails before any work.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recap_ds.data.lerobot import layout_v2, layout_v3
from recap_ds.data.lerobot.entries import EpisodeEntry, check_files
from recap_ds.data.lerobot.tables import one_line
from recap_ds.errors import UsageError


@dataclass(frozen=True)
class Camera:
    key: str  # the feature, "observation.images.top"
    name: str  # in our shards, "top"
    stored_as: Literal["video", "image"]
    height: int
    width: int


@dataclass(frozen=True)
class DatasetMetadata:
    root: Path
    version: str  # of the format, "v3.0"
    fps: float
    features: dict[str, dict[str, Any]]
    cameras: tuple[Camera, ...]
    left_out_cameras: tuple[str, ...]  # keys: depth maps, which the shards have no place for, and what nobody chose
    tasks: dict[int, str]
    episodes: tuple[EpisodeEntry, ...]  # by index
    skipped_episodes: tuple[int, ...] = ()  # which the data set has as well

    @property
    def num_frames(self) -> int:
        return sum(episode.num_frames for episode in self.episodes)


def load_metadata(
    root: Path, camera_names: Mapping[str, str] | None = None, skip_episodes: tuple[int, ...] = ()
) -> DatasetMetadata:
    """``camera_names``: new name -> feature key, or the name it would have; only these cameras are read. None: all.

    ``skip_episodes``: broken ones, say; their files may even be missing.
    """
    info_path = root / "meta" / "info.json"
    info = _read_info(info_path)
    features = info["features"]
    keys = [key for key, feature in features.items() if feature.get("dtype") in ("video", "image")]
    colour = [key for key in keys if not _is_depth_map(features[key])]
    cameras = _cameras(features, _choose(colour, camera_names, info_path), info_path)
    for camera in cameras:
        video_fps = _video_info(features[camera.key]).get("video.fps", info["fps"])
        if video_fps != info["fps"]:
            raise UsageError(
                f"{info_path}: camera {camera.name} runs at {video_fps} fps, the data set at {info['fps']}; "
                f"re-encode the video at the data set's rate"
            )
    layout = layout_v3 if info["codebase_version"].startswith("v3") else layout_v2
    read = {camera.key for camera in cameras}
    video_keys = [camera.key for camera in cameras if camera.stored_as == "video"]
    episodes = layout.read_entries(root, info, video_keys, skip_episodes)
    if not episodes:
        raise UsageError(f"--skip-episodes: leaves no episode of {root}")
    check_files(episodes)
    return DatasetMetadata(
        root=root,
        version=info["codebase_version"],
        fps=float(info["fps"]),
        features=features,
        cameras=cameras,
        left_out_cameras=tuple(key for key in keys if key not in read),
        tasks=layout.read_tasks(root),
        episodes=episodes,
        skipped_episodes=skip_episodes,
    )


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the root of a LeRobot data set, the folder that holds meta/")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({one_line(error)})") from error
    version = str(info.get("codebase_version", "unknown")) if isinstance(info, dict) else "unknown"
    if not re.fullmatch(r"v?(3|2\.[01])(\..*)?", version):
        raise UsageError(
            f"{path}: data set format {version}, this importer reads v3.0, v2.1 and v2.0; convert an older set with "
            "the LeRobot release that wrote it"
        )
    info["codebase_version"] = f"v{version.removeprefix('v')}"
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


def _is_depth_map(feature: dict[str, Any]) -> bool:
    return bool(_video_info(feature).get("video.is_depth_map") or _video_info(feature).get("is_depth_map"))


def _choose(keys: list[str], names: Mapping[str, str] | None, info_path: Path) -> dict[str, str]:
    """New name -> feature key."""
    if names is None:
        chosen: dict[str, str] = {}
        for key in keys:
            # Tar readers often lower-case suffixes, so names that differ in case only would collide there.
            other = chosen.setdefault(camera_name(key).lower(), key)
            if other != key:
                raise UsageError(
                    f"{info_path}: {other} and {key} both become camera {camera_name(key)!r}; name them with "
                    f"--camera NEW=OLD"
                )
        return {camera_name(key): key for key in keys}
    known = {camera_name(key): key for key in keys} | {key: key for key in keys}
    for new, old in names.items():
        if old not in known:
            raise UsageError(
                f"{info_path}: --camera {new}={old}: no such camera; the data set has {', '.join(keys) or 'none'}"
            )
    return {new: known[old] for new, old in names.items()}


def _cameras(features: dict[str, dict[str, Any]], chosen: dict[str, str], info_path: Path) -> tuple[Camera, ...]:
    if not chosen:
        raise UsageError(f"{info_path}: no feature of dtype video or image; a policy here needs at least one camera")
    cameras = []
    for name, key in chosen.items():
        height, width = _image_sides(key, features[key], info_path)
        cameras.append(Camera(key, name, features[key]["dtype"], height, width))
    return tuple(cameras)


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
