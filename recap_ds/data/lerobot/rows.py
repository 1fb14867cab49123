"""The numeric rows of each episode, one data file in memory at a time.

T = frames of the episode, D = numbers per frame of a column. A data file holds many episodes in order, a row per frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from recap_ds.data.lerobot.metadata import DatasetMetadata, EpisodeEntry
from recap_ds.data.lerobot.tables import column_to_numpy, read_table
from recap_ds.errors import UsageError


@dataclass(frozen=True)
class EpisodeRows:
    entry: EpisodeEntry
    first_row: int  # of the episode, in its data file
    columns: dict[str, np.ndarray]  # [T, D]; views: copy what is kept


def read_rows(metadata: DatasetMetadata, columns: list[str]) -> Iterator[EpisodeRows]:
    """Every episode's rows of the named columns, by data file; checks that they are the episode's frames 0..T-1."""
    # Data files follow the episodes' order, except in sets edited by hand: sorting reads each file once even there.
    by_file = sorted(metadata.episodes, key=lambda entry: (str(entry.data_path), entry.index))
    for path, entries in groupby(by_file, key=lambda entry: entry.data_path):
        names = ["episode_index", "frame_index", *columns]
        table = read_table(path, names)
        arrays = {name: column_to_numpy(table, name, path) for name in names}
        del table
        owner = arrays["episode_index"][:, 0]
        if (np.diff(owner) < 0).any():
            raise UsageError(
                f"{path}: rows of episode {owner[:-1][np.diff(owner) < 0][0]} are followed by an earlier one's"
            )
        for entry in entries:
            first, end = np.searchsorted(owner, [entry.index, entry.index + 1]).tolist()
            if end - first != entry.num_frames:
                raise UsageError(
                    f"{path}: episode {entry.index} has {end - first} rows, meta/episodes says {entry.num_frames}"
                )
            _check_frame_index(arrays["frame_index"][first:end, 0], entry, path)
            yield EpisodeRows(entry, first, {name: arrays[name][first:end] for name in columns})


def _check_frame_index(frame_index: np.ndarray, entry: EpisodeEntry, path: Path) -> None:
    wrong = np.flatnonzero(frame_index != np.arange(entry.num_frames))
    if len(wrong):
        raise UsageError(
            f"{path}: episode {entry.index} has frame_index {frame_index[wrong[0]]} at its row {wrong[0]}; "
            f"frames must run from 0 without gaps"
        )
