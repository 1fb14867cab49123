"""What recorders left behind about how an episode ended, in each of the ways that are in use.

    next.success, is_success          LeRobot evaluations and rollouts; RLinf: true at some frame = success
    next.truncated, next.done         time ran out; the episode ended (whichever way)
    next.reward of only 0 and 1       HIL-SERL: 1 = success, if any episode of the set ever has a 1
    is_terminal with mc_return        LeRobot's RECAP branch: the return of the last frame is 0 or the cost of failing
    meta/returns*.parquet             RLinf's sidecar: the same, as the reward of the last frame
    sarm_progress.parquet             a reward model's progress in [0, 1]: an opinion, asked only where one says so

``Recorded`` is one episode's evidence; which of it counts before which is said in ``outcomes.py``. T = frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.data.lerobot.metadata import DatasetMetadata
from recap_ds.data.lerobot.rows import EpisodeRows, read_rows
from recap_ds.data.lerobot.tables import as_flags, column_to_numpy, open_parquet, read_table
from recap_ds.errors import UsageError

SUCCESS_COLUMNS = ("next.success", "is_success")
TRUNCATED_COLUMN, DONE_COLUMN, REWARD_COLUMN = "next.truncated", "next.done", "next.reward"
TERMINAL_COLUMN, RETURN_COLUMN = "is_terminal", "mc_return"
RETURNS_SIDECARS = "meta/returns*.parquet"
PROGRESS_SIDECAR = "sarm_progress.parquet"
PROGRESS_COLUMNS = ("progress_sparse", "progress_dense")
# Returns are float32 sums of whole numbers, divided by a length: a failure costs far more than this.
SUCCESS_RETURN_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Recorded:
    """Of one episode; None = the data set does not say."""

    success: bool | None = None  # true at any frame
    truncated: bool | None = None  # true at any frame
    done: bool | None = None  # true at any frame
    reward_is_flag: bool = False  # every reward is 0 or 1
    rewarded: bool = False  # some reward is 1
    terminal: bool | None = None  # the last frame ends the task
    final_return: float | None = None  # of the last frame


def read_recorded(metadata: DatasetMetadata) -> Iterator[tuple[int, Recorded]]:
    """Every episode's evidence from the columns of its rows, by index."""
    optional = (*SUCCESS_COLUMNS, TRUNCATED_COLUMN, DONE_COLUMN, REWARD_COLUMN, TERMINAL_COLUMN, RETURN_COLUMN)
    for rows in read_rows(metadata, [name for name in optional if name in metadata.features]):
        yield rows.entry.index, _recorded(rows)


def _recorded(rows: EpisodeRows) -> Recorded:
    def flags(name: str) -> np.ndarray | None:
        values = rows.columns.get(name)
        return None if values is None else as_flags(values, name, rows.entry.data_path)

    def ever(name: str) -> bool | None:
        values = flags(name)
        return None if values is None else bool(values.any())

    successes = [value for value in map(ever, SUCCESS_COLUMNS) if value is not None]
    rewards, returns, terminal = rows.columns.get(REWARD_COLUMN), rows.columns.get(RETURN_COLUMN), None
    if returns is not None:
        terminal = flags(TERMINAL_COLUMN)
    return Recorded(
        success=any(successes) if successes else None,
        truncated=ever(TRUNCATED_COLUMN),
        done=ever(DONE_COLUMN),
        reward_is_flag=rewards is not None and bool(np.isin(rewards, (0, 1)).all()),
        rewarded=rewards is not None and bool((rewards == 1).any()),
        terminal=None if terminal is None else bool(terminal[-1]),
        final_return=None if returns is None else float(returns[-1, 0]),
    )


def read_final_rewards(metadata: DatasetMetadata) -> dict[int, float]:
    """Reward of every episode's last frame from RLinf's sidecar; {} without one."""
    paths = sorted(metadata.root.glob(RETURNS_SIDECARS))
    if not paths:
        return {}
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise UsageError(f"{metadata.root}/meta: several returns ({names}); leave the one that holds, or give --labels")
    columns = _numbers(paths[0], ["episode_index", "frame_index", "reward"])
    return _last_values(metadata, paths[0], columns["episode_index"], columns["frame_index"], columns["reward"])


def read_final_progress(metadata: DatasetMetadata) -> dict[int, float]:
    """Progress in [0, 1] at every episode's last frame, as SARM saw it."""
    path = metadata.root / PROGRESS_SIDECAR
    if not path.is_file():
        raise UsageError(f"{path}: no such file, --success-progress reads it; make it with LeRobot's SARM")
    there = open_parquet(path).schema_arrow.names
    name = next((name for name in PROGRESS_COLUMNS if name in there), None)
    if name is None:
        raise UsageError(f"{path}: no column {' or '.join(PROGRESS_COLUMNS)}; make it again")
    columns = _numbers(path, ["episode_index", "index", name])
    # Rows may be thinned: the last one of an episode speaks for it.
    return _last_values(metadata, path, columns["episode_index"], columns["index"], columns[name], complete=False)


def is_success_return(value: float) -> bool:
    """Of the last frame of an episode that ended: 0 after a success, the negative cost of failing after a failure."""
    return value > -SUCCESS_RETURN_TOLERANCE


def _numbers(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    table = read_table(path, names)
    return {name: column_to_numpy(table, name, path)[:, 0] for name in names}


def _last_values(
    metadata: DatasetMetadata,
    path: Path,
    episode: np.ndarray,
    position: np.ndarray,
    values: np.ndarray,
    complete: bool = True,
) -> dict[int, float]:
    """The value at the largest position of each episode; ``complete``: an episode must have all its frames."""
    order = np.lexsort((position, episode))
    last: dict[int, float] = {}
    for entry in metadata.episodes:
        first, end = np.searchsorted(episode[order], [entry.index, entry.index + 1]).tolist()
        if first == end or (complete and end - first != entry.num_frames):
            raise UsageError(
                f"{path}: {end - first} rows of episode {entry.index}, which has {entry.num_frames} frames; "
                f"make the file again"
            )
        last[entry.index] = float(values[order][end - 1])
    return last
