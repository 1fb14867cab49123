"""How each episode ended and who acted, from whatever the recorder left behind (``recorded.py`` lists it).

Outcome, first rule that applies:

1. a row of the labels file (--labels, or meta/episode_labels.csv);
2. a success flag that is ever true -> success;
3. a truncated flag that is ever true -> truncated;
4. a success flag that never is -> failure;
5. the return or reward of a last frame that ended the task -> success at 0, else failure; not ended -> truncated;
6. rewards of 0 and 1, of which the set has a 1 -> success at a 1; else failure, or truncated where never done;
7. with --success-progress P: SARM's progress at the last frame, at least P -> success, else failure;
8. a demonstration -> success; else unknown, which policy data may not be: its returns would be invented.

Human control is one bool per frame, under the names recorders use.
"""

import csv
from pathlib import Path

import numpy as np

from recap_ds.batch import OUTCOME_IDS
from recap_ds.config import SourceName
from recap_ds.data.lerobot.metadata import DatasetMetadata
from recap_ds.data.lerobot.recorded import (
    Recorded,
    is_success_return,
    read_final_progress,
    read_final_rewards,
    read_recorded,
)
from recap_ds.data.lerobot.tables import one_line
from recap_ds.errors import UsageError

HUMAN_COLUMNS = ("intervention", "is_intervention", "complementary_info.is_intervention", "teleop_mask")
LABELS_IN_DATASET = "meta/episode_labels.csv"
SUCCESS_WORDS = {
    "1": "success",
    "true": "success",
    "yes": "success",
    "0": "failure",
    "false": "failure",
    "no": "failure",
}
MAX_LISTED_EPISODES = 20


def human_column(metadata: DatasetMetadata) -> str | None:
    return next((name for name in HUMAN_COLUMNS if name in metadata.features), None)


def read_outcomes(
    metadata: DatasetMetadata, source: SourceName, labels_path: Path | None, success_progress: float | None = None
) -> dict[int, str]:
    """Outcome of every episode, by index. Refuses policy data with an episode whose outcome nothing tells."""
    inside = metadata.root / LABELS_IN_DATASET
    if labels_path is None and inside.is_file():
        labels_path = inside
    known = {entry.index for entry in metadata.episodes}.union(metadata.skipped_episodes)
    labels = {} if labels_path is None else read_labels(labels_path, known)
    recorded = dict(read_recorded(metadata))
    final_rewards = read_final_rewards(metadata)
    progress = {} if success_progress is None else read_final_progress(metadata)
    # A column of nothing but zeros is a reward nobody gave, not a set in which every episode failed.
    rewards_tell = all(one.reward_is_flag for one in recorded.values()) and any(
        one.rewarded for one in recorded.values()
    )
    outcomes = {}
    for index, one in recorded.items():
        outcome = labels.get(index) or _by_flags(one) or _by_return(one, final_rewards.get(index))
        if outcome is None and rewards_tell:
            outcome = _by_reward(one)
        if outcome is None and progress:
            outcome = "success" if progress[index] >= success_progress else "failure"
        outcomes[index] = outcome or ("success" if source == "demo" else "unknown")
    unknown = [index for index, outcome in sorted(outcomes.items()) if outcome == "unknown"]
    if unknown and source != "demo":
        listed = ", ".join(map(str, unknown[:MAX_LISTED_EPISODES]))
        more = f" and {len(unknown) - MAX_LISTED_EPISODES} more" if len(unknown) > MAX_LISTED_EPISODES else ""
        raise UsageError(
            f"{metadata.root}: no outcome is recorded for {len(unknown)} {source} episodes: {listed}{more}; give "
            f"them in a CSV with the columns episode_index,outcome (success, failure or truncated) through --labels"
        )
    return outcomes


def _by_flags(recorded: Recorded) -> str | None:
    if recorded.success:
        return "success"
    if recorded.truncated:
        return "truncated"
    return None if recorded.success is None else "failure"


def _by_return(recorded: Recorded, final_reward: float | None) -> str | None:
    if recorded.final_return is not None and recorded.terminal is not None:
        if not recorded.terminal:
            return "truncated"
        return "success" if is_success_return(recorded.final_return) else "failure"
    if final_reward is not None:
        return "success" if is_success_return(final_reward) else "failure"
    return None


def _by_reward(recorded: Recorded) -> str:
    if recorded.rewarded:
        return "success"
    return "truncated" if recorded.done is False else "failure"


def read_labels(path: Path, episodes: set[int]) -> dict[int, str]:
    """CSV with episode_index and either success (true or false) or outcome; episodes it leaves out keep their own."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            header = set(rows.fieldnames or ())
            value_column = next((name for name in ("outcome", "success") if name in header), None)
            if "episode_index" not in header or value_column is None:
                raise UsageError(f"{path}: the first line must name episode_index and outcome (or success)")
            labels: dict[int, str] = {}
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                index, outcome = _label(row["episode_index"], row[value_column], value_column, where)
                if index not in episodes:
                    raise UsageError(f"{where}: the data set has no episode {index}")
                if index in labels:
                    raise UsageError(f"{where}: episode {index} is labelled twice")
                labels[index] = outcome
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot read the labels ({one_line(error)})") from error
    return labels


def _label(index: str | None, value: str | None, value_column: str, where: str) -> tuple[int, str]:
    word = (value or "").strip().lower()
    outcome = SUCCESS_WORDS.get(word) if value_column == "success" else word
    if outcome not in OUTCOME_IDS:
        allowed = "true or false" if value_column == "success" else ", ".join(OUTCOME_IDS)
        raise UsageError(f"{where}: {value_column} is {value!r}, it must be {allowed}")
    if not (index or "").strip().isdigit():
        raise UsageError(f"{where}: episode_index is {index!r}, it must be a whole number")
    return int(index), outcome


def human_mask(flags: np.ndarray, source: SourceName, episode: str) -> np.ndarray | None:
    """[T] bool, True = a human acts. None for demonstrations, where a human always does and the column says nothing."""
    if source == "intervention":
        return flags
    if source == "auto" and flags.any():
        raise UsageError(
            f"episode {episode}: a human acts in {int(flags.sum())} frames of a set imported with --source auto; "
            f"import it with --source intervention"
        )
    return None
