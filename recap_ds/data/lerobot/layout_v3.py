"""Tasks and episodes of LeRobot v3.0, whose data files and videos hold many episodes each.

meta/tasks.parquet             task_index and the task's text (the pandas index, under one of two names)
meta/episodes/*/*.parquet      one row per episode: length, data file, and per camera a video file and a time span in it
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from recap_ds.data.lerobot.entries import EpisodeEntry, VideoSpan, check_listed, check_skipped, path_from_template
from recap_ds.data.lerobot.tables import open_parquet, read_table
from recap_ds.errors import UsageError

# The task's text is the pandas index of tasks.parquet: named by newer writers, not by older ones.
TASK_TEXT_COLUMNS = ("task", "__index_level_0__")
VIDEO_PARTS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def read_tasks(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; the data set is incomplete, copy it again")
    columns = open_parquet(path).schema_arrow.names
    text_column = next((name for name in TASK_TEXT_COLUMNS if name in columns), None)
    if text_column is None:
        raise UsageError(f"{path}: no column {' or '.join(TASK_TEXT_COLUMNS)} with the text of the tasks")
    table = read_table(path, ["task_index", text_column])
    return dict(zip(table["task_index"].to_pylist(), table[text_column].to_pylist(), strict=True))


def read_entries(
    root: Path, info: dict[str, Any], video_keys: list[str], skipped: Collection[int]
) -> tuple[EpisodeEntry, ...]:
    """By index, without the ``skipped``, of which nothing is asked but their place in the list."""
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UsageError(f"{folder}: no */*.parquet; the data set is incomplete, copy it again")
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
    check_skipped(skipped, [row["episode_index"] for row in rows], folder)
    entries = tuple(_entry(root, info, row, video_keys) for row in rows if row["episode_index"] not in skipped)
    check_listed([(row["episode_index"], row["length"]) for row in rows], info, folder)
    return entries


def _entry(root: Path, info: dict[str, Any], row: dict[str, Any], video_keys: list[str]) -> EpisodeEntry:
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
        path = path_from_template(root, info, "video_path", {**part, "video_key": key})
        videos[key] = VideoSpan(path, part["from_timestamp"])
    place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
    return EpisodeEntry(index, length, path_from_template(root, info, "data_path", place), videos)
