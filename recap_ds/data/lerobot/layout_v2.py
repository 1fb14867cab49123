"""Tasks and episodes of LeRobot v2.1 (and v2.0, which differs in its statistics only): a file per episode.

meta/tasks.jsonl       {"task_index": 0, "task": "lift the cube"}
meta/episodes.jsonl    {"episode_index": 0, "tasks": ["lift the cube"], "length": 250}
data/chunk-000/episode_000000.parquet      videos/chunk-000/<camera key>/episode_000000.mp4
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from recap_ds.data.lerobot.entries import EpisodeEntry, VideoSpan, check_listed, check_skipped, path_from_template
from recap_ds.data.lerobot.tables import one_line
from recap_ds.errors import UsageError

EPISODES_PER_CHUNK = 1000  # where info.json does not say


def read_tasks(root: Path) -> dict[int, str]:
    return {row["task_index"]: row["task"] for row in _read_rows(root / "meta" / "tasks.jsonl", "task_index", task=str)}


def read_entries(
    root: Path, info: dict[str, Any], video_keys: list[str], skipped: Collection[int]
) -> tuple[EpisodeEntry, ...]:
    """By index, without the ``skipped``, of which nothing is asked but their place in the list."""
    path = root / "meta" / "episodes.jsonl"
    chunk_size = info.get("chunks_size", EPISODES_PER_CHUNK)
    if type(chunk_size) is not int or chunk_size < 1:
        raise UsageError(f"{root}/meta/info.json: chunks_size is {chunk_size!r}, it must be a whole number above 0")
    rows = _read_rows(path, "episode_index", length=int)
    if not rows:
        raise UsageError(f"{path}: lists no episode; the data set is incomplete, copy it again")
    check_skipped(skipped, [row["episode_index"] for row in rows], path)
    entries = []
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        index, length = row["episode_index"], row["length"]
        if index in skipped:
            continue
        if length < 1:
            raise UsageError(f"{path}: episode {index} has length {length}; remove it from the data set")
        parts = {"episode_index": index, "episode_chunk": index // chunk_size}
        videos = {
            key: VideoSpan(path_from_template(root, info, "video_path", {**parts, "video_key": key}), 0.0)
            for key in video_keys
        }
        entries.append(EpisodeEntry(index, length, path_from_template(root, info, "data_path", parts), videos))
    check_listed([(row["episode_index"], row["length"]) for row in rows], info, path)
    return tuple(entries)


def _read_rows(path: Path, index_key: str, **kinds: type) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with a whole number at ``index_key`` and values of ``kinds``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); copy the data set again") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not valid JSON ({one_line(error)}); copy it again") from error
        for key, kind in {index_key: int, **kinds}.items():
            if not isinstance(row, dict) or type(row.get(key)) is not kind:
                raise UsageError(f"{path}, line {number}: {key} is missing or no {_NAMES[kind]}; copy the file again")
        rows.append(row)
    return rows


_NAMES = {int: "whole number", str: "text"}
