"""A unit's evaluation_results.json, read into what the study keeps of it: every episode's outcome and length."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.errors import UsageError
from recap_ds.study.results import Entry, Episodes


class Rollouts(NamedTuple):
    fps: float
    entries: list[Entry]


def read_rollouts(path: Path, num_episodes: int, first_scene: int, guidance_betas: Sequence[float]) -> Rollouts:
    """UsageError where they are of another evaluation, or not whole."""
    try:
        rollouts = json.loads(path.read_text(encoding="utf-8"))["rollouts"]
        entries = [_entry(entry) for entry in rollouts["entries"]]
        played = (rollouts["num_episodes"], rollouts["seed"], tuple(entry.guidance_beta for entry in entries))
        fps = float(rollouts["fps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read ({type(error).__name__}: {error}); remove it") from None
    if played != (num_episodes, first_scene, tuple(guidance_betas)):
        told = f"{played[0]} episodes from seed {played[1]}, guidance {', '.join(map(str, played[2]))}"
        raise UsageError(f"{path}: is of another evaluation ({told}); remove it")
    counts = {sum(len(episodes.success) for episodes in entry.tasks.values()) for entry in entries}
    if counts != {num_episodes} or not (math.isfinite(fps) and fps > 0):
        told = " and ".join(map(str, sorted(counts)))
        raise UsageError(f"{path}: is not whole ({told} of {num_episodes} episodes at {fps:g} fps); remove it")
    return Rollouts(fps, entries)


def _entry(entry: dict[str, Any]) -> Entry:
    tasks: dict[str, Episodes] = {}
    for episode in entry["episodes"]:
        task = tasks.setdefault(episode["task"], Episodes([], []))
        task.success.append(bool(episode["success"]))
        task.num_frames.append(int(episode["frames"]))
    return Entry(entry["indicator"], float(entry["guidance_beta"]), tasks)
