"""Where one episode of a LeRobot data set lies, and the checks that every version of the format shares.

Frames are counted from 0 within an episode. This file opens no table and no video.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from recap_ds.errors import UsageError


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


def path_from_template(root: Path, info: dict[str, Any], name: str, parts: dict[str, Any]) -> Path:
    """``info[name]`` with its fields filled in. The template is data: it may not lead out of the data set."""
    try:
        relative = info[name].format(**parts)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        what = f"{name} {info.get(name)!r} is not a path template of {info['codebase_version']}"
        raise UsageError(f"{root}/meta/info.json: {what}; copy the file again") from error
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise UsageError(f"{root}/meta/info.json: {name} {info[name]!r} leads out of the data set; correct it")
    return root / relative


def check_listed(lengths: list[tuple[int, int]], info: dict[str, Any], where: Path) -> None:
    """``lengths``: (episode, frames) as ``where`` lists them. None twice, and as many as info.json says."""
    for before, after in pairwise(sorted(lengths)):
        if before[0] == after[0]:
            raise UsageError(f"{where}: episode {after[0]} stands there twice; copy the data set again")
    for key, found in (("total_episodes", len(lengths)), ("total_frames", sum(length for _, length in lengths))):
        if info.get(key, found) != found:
            raise UsageError(f"{where}: holds {found} where meta/info.json says {key} {info[key]}; copy it again")


def check_skipped(skipped: Collection[int], known: Collection[int], where: Path) -> None:
    if unknown := sorted(set(skipped) - set(known)):
        raise UsageError(f"--skip-episodes: {where} lists no episode {unknown[0]} among its {len(known)}")


def check_files(entries: tuple[EpisodeEntry, ...]) -> None:
    checked: set[Path] = set()
    for entry in entries:
        for path in (entry.data_path, *(span.path for span in entry.videos.values())):
            if path not in checked and not path.is_file():
                raise UsageError(f"{path}: no such file, episode {entry.index} needs it; copy the data set again")
            checked.add(path)
