"""What an episode must be before it is written: every fault is one line naming the episode and the frame.

T = frames, S = state dims, A = action dims.
"""

from dataclasses import dataclass

import numpy as np

from recap_ds.batch import OUTCOME_IDS
from recap_ds.config import SOURCES
from recap_ds.data.episodes import Episode
from recap_ds.errors import UsageError

# Longest list of names in a message.
MAX_NAMES_SHOWN = 10


@dataclass(frozen=True)
class EpisodeArrays:
    """The checked arrays of one episode, as they are stored."""

    states: np.ndarray  # [T, S] float32
    actions: np.ndarray  # [T, A] float32
    human: np.ndarray  # [T] bool
    rewards: np.ndarray | None  # [T] float32


def check_episode(episode: Episode, dataset: str) -> EpisodeArrays:
    where = f"episode {episode.name}"
    if not episode.name.startswith(f"{dataset}/") or len(episode.name) == len(dataset) + 1:
        raise UsageError(f"{where}: a name is '<data set>/<index>', here '{dataset}/<index>'")
    if episode.source not in SOURCES:
        raise UsageError(f"{where}: source is {episode.source!r}, not one of {', '.join(SOURCES)}")
    if episode.outcome not in OUTCOME_IDS:
        raise UsageError(f"{where}: outcome is {episode.outcome!r}, not one of {', '.join(OUTCOME_IDS)}")
    if not episode.fps > 0:
        raise UsageError(f"{where}: fps is {episode.fps!r}; it must be positive")
    states = _float_rows(where, "state", episode.states, num_axes=2)
    num_frames = len(states)
    actions = _float_rows(where, "actions", episode.actions, num_axes=2, num_frames=num_frames)
    rewards = None
    if episode.rewards is not None:
        rewards = _float_rows(where, "rewards", episode.rewards, num_axes=1, num_frames=num_frames)
    return EpisodeArrays(states, actions, _human_frames(where, episode, num_frames), rewards)


def check_outcomes_known(episodes: list[str]) -> None:
    """``episodes``: names of the auto and intervention episodes whose outcome is unknown."""
    if episodes:
        raise UsageError(
            f"{len(episodes)} auto or intervention episodes have no outcome ({shorten(episodes)}); "
            "RECAP learns from success and failure: label them, or leave them out"
        )


def shorten(names: list[str]) -> str:
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _float_rows(
    where: str, feature: str, values: np.ndarray, num_axes: int, num_frames: int | None = None
) -> np.ndarray:
    if values.ndim != num_axes or 0 in values.shape:
        axes = "[frames, dims]" if num_axes == 2 else "[frames]"
        raise UsageError(f"{where}: {feature} has shape {list(values.shape)}, expected {axes}, none of them 0")
    if num_frames is not None and len(values) != num_frames:
        raise UsageError(f"{where}: {feature} has {len(values)} frames, state has {num_frames}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is named below
        stored = np.ascontiguousarray(values, dtype=np.float32)
    bad = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if bad.any():
        frame = int(np.flatnonzero(bad)[0])
        raise UsageError(f"{where}, frame {frame}: {feature} is not finite ({values[frame].tolist()})")
    return stored


def _human_frames(where: str, episode: Episode, num_frames: int) -> np.ndarray:
    if episode.human is None:
        # A demonstration is a human's from end to end; elsewhere nobody took over.
        return np.full(num_frames, episode.source == "demo")
    if episode.human.dtype != np.bool_ or episode.human.shape != (num_frames,):
        raise UsageError(
            f"{where}: human is {episode.human.dtype} {list(episode.human.shape)}, expected bool [{num_frames}]"
        )
    if episode.source == "auto" and episode.human.any():
        raise UsageError(f"{where}: a human acts in an auto data set; import it as intervention")
    return episode.human
