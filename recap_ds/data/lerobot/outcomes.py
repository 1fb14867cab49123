"""How each episode ended and who acted, from whatever the recorder left behind.

Outcome, first rule that applies: a row of the labels file; any next.success -> success; any next.truncated ->
truncated; a next.success column that is never true -> failure; a demonstration -> success; else unknown, which policy
data may not be: its returns would be invented. Human control is one bool per frame, under the names recorders use.
"""

import csv
from pathlib import Path

import numpy as np

from recap_ds.batch import OUTCOME_IDS
from recap_ds.config import SourceName
from recap_ds.data.lerobot.metadata import DatasetMetadata
from recap_ds.data.lerobot.rows import read_rows
from recap_ds.data.lerobot.tables import as_flags, one_line
from recap_ds.errors import UsageError

SUCCESS_COLUMN = "next.success"
TRUNCATED_COLUMN = "next.truncated"
HUMAN_COLUMNS = ("intervention", "is_intervention", "complementary_info.is_intervention")
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


def read_outcomes(metadata: DatasetMetadata, source: SourceName, labels_path: Path | None) -> dict[int, str]:
    """Outcome of every episode, by index. Refuses policy data with an episode whose outcome nothing tells."""
    inside = metadata.root / LABELS_IN_DATASET
    if labels_path is None and inside.is_file():
        labels_path = inside
    labels = {} if labels_path is None else read_labels(labels_path, {entry.index for entry in metadata.episodes})
    columns = [name for name in (SUCCESS_COLUMN, TRUNCATED_COLUMN) if name in metadata.features]
    outcomes = {}
    for rows in read_rows(metadata, columns):
        path = rows.entry.data_path
        flags = {name: bool(as_flags(values, name, path).any()) for name, values in rows.columns.items()}
        outcomes[rows.entry.index] = labels.get(rows.entry.index) or outcome_of(flags, source)
    unknown = [index for index, outcome in sorted(outcomes.items()) if outcome == "unknown"]
    if unknown and source != "demo":
        listed = ", ".join(map(str, unknown[:MAX_LISTED_EPISODES]))
        more = f" and {len(unknown) - MAX_LISTED_EPISODES} more" if len(unknown) > MAX_LISTED_EPISODES else ""
        raise UsageError(
            f"{metadata.root}: no outcome is recorded for {len(unknown)} {source} episodes: {listed}{more}; give "
            f"them in a CSV with the columns episode_index,outcome (success, failure or truncated) through --labels"
        )
    return outcomes


def outcome_of(flags: dict[str, bool], source: SourceName) -> str:
    """Outcome of an episode from which of the two columns exist and whether each was ever true."""
    if flags.get(SUCCESS_COLUMN):
        return "success"
    if flags.get(TRUNCATED_COLUMN):
        return "truncated"
    if SUCCESS_COLUMN in flags:
        return "failure"
    return "success" if source == "demo" else "unknown"


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
