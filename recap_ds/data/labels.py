"""Advantage labels of a shard folder, and how training reads them.

    labels/<tag>/labels.json  <shard>.parquet    key, episode, frame, value, return, advantage, indicator

labels.json, written last, says what they were made of, names the shards by their manifest's hash and holds every label
file's size and sha256. Shards themselves are never written.

    N samples of the set   K tasks
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.data import array_file
from recap_ds.data.array_file import Layout, Stored, arrays_of, shared_arrays
from recap_ds.data.label_records import LABELS_NAME, LabelRecord, load_record, save_record
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.sidecars import (
    AGAIN,
    check_manifest,
    floats,
    identity_columns,
    make_folder,
    nullable,
    read_all,
    sidecar_path,
    unknown_tag,
    write_table,
)
from recap_ds.errors import UsageError
from recap_ds.files.records import file_problems, record_file

MAX_RECORD_BYTES = 2**28  # of labels that are fetched
# Of the mapped labels.
FORMAT = "labels-1"
INDICATOR_NAMES = {number: name for name, number in INDICATOR_IDS.items()}


class LabelColumns(NamedTuple):
    value: np.ndarray  # [N] float32, NaN = not known, here and below
    returns: np.ndarray  # [N] float32, Monte-Carlo
    advantage: np.ndarray  # [N] float32
    indicator: np.ndarray  # [N] int64, INDICATOR_IDS


@dataclass(frozen=True)
class LabelSet:
    """Labels of a whole shard set by sample id, as training reads them. Picklable."""

    record: LabelRecord
    stored: Stored  # advantage and indicator; of a large set mapped, so that no worker copies them
    sigma: np.ndarray  # [K] float32 by task id, inf where no advantage was ranked

    @property
    def advantage(self) -> np.ndarray:
        """[N] float32, 0 where it is not known."""
        return arrays_of(self.stored)["advantage"]

    @property
    def indicator(self) -> np.ndarray:
        """[N] int8, INDICATOR_IDS."""
        return arrays_of(self.stored)["indicator"]

    @classmethod
    def open(cls, shard_set: ShardSet, tag: str, max_length: Mapping[str, int] | None = None) -> "LabelSet":
        """``max_length``: the L_task that the run measures in, where it has one; labels in another are refused."""
        record = read_label_record(shard_set, tag)
        for task, frames in (max_length or {}).items():
            if task in record.values.max_length and record.values.max_length[task] != frames:
                raise UsageError(
                    f"value.max_length: task '{task}' is measured in {frames} frames here, in labels '{tag}' in "
                    f"{record.values.max_length[task]}; set value.max_length.{task}={record.values.max_length[task]}"
                )
        sigma = [record.tasks[task].sigma for task in shard_set.manifest.tasks]
        sigma_array = np.array([np.inf if value is None else value for value in sigma], np.float32)
        return cls(record, _stored_labels(shard_set, tag, record), sigma_array)


def _stored_labels(shard_set: ShardSet, tag: str, record: LabelRecord) -> Stored:
    layouts = {
        "advantage": Layout("<f4", (shard_set.num_samples,)),
        "indicator": Layout("|i1", (shard_set.num_samples,)),
    }

    def fill(arrays: Mapping[str, np.ndarray]) -> None:
        columns = _read_columns(shard_set, tag)
        arrays["advantage"][...] = np.nan_to_num(columns.advantage, nan=0.0)
        arrays["indicator"][...] = columns.indicator

    if shard_set.num_samples > array_file.MAX_SAMPLES_IN_MEMORY:
        return shared_arrays(f"{FORMAT}-{record.content_hash()[:32]}", lambda: (layouts, fill))
    arrays = {name: np.empty(layout.shape, layout.dtype) for name, layout in layouts.items()}
    fill(arrays)
    return arrays


def labels_folder(shards: str | Path, tag: str) -> Path:
    return Path(shards) / "labels" / tag


def write_labels(shard_set: ShardSet, tag: str, record: LabelRecord, columns: LabelColumns) -> LabelRecord:
    """All label files of ``tag``, labels.json last; ``record.files`` is filled in."""
    folder = labels_folder(shard_set.folder, tag)
    files = {}
    make_folder(folder)
    (folder / LABELS_NAME).unlink(missing_ok=True)  # of labels that are now made again: unfinished until then
    for shard, entry in enumerate(shard_set.manifest.shards):
        rows = slice(shard_set.shard_starts[shard], shard_set.shard_starts[shard + 1])
        path = sidecar_path(folder, entry.name)
        indicator = pa.array(columns.indicator[rows].astype(np.int8))
        names = pa.array([INDICATOR_NAMES[number] for number in range(len(INDICATOR_NAMES))])
        write_table(
            path,
            identity_columns(shard_set, shard)
            | {
                "value": nullable(columns.value[rows]),
                "return": nullable(columns.returns[rows]),
                "advantage": nullable(columns.advantage[rows]),
                "indicator": pa.DictionaryArray.from_arrays(indicator, names).cast(pa.string()),
            },
        )
        files[path.name] = record_file(path)
    record = record.model_copy(update={"files": files})
    save_record(record, folder / LABELS_NAME)
    return record


def load_label_record(shards: str | Path, tag: str) -> LabelRecord | None:
    """None where ``tag`` has no finished labels."""
    path = labels_folder(shards, tag) / LABELS_NAME
    return load_record(LabelRecord, path) if path.is_file() else None


def read_label_record(shard_set: ShardSet, tag: str) -> LabelRecord:
    """UsageError for an unknown tag, other shards, and files that are missing or were changed."""
    folder = labels_folder(shard_set.folder, tag)
    if shard_set.remote is not None:
        shard_set.remote.fetch_sidecar(f"labels/{tag}/{LABELS_NAME}", MAX_RECORD_BYTES)
    record = load_label_record(shard_set.folder, tag)
    if record is None:
        raise unknown_tag(shard_set.folder, "labels", LABELS_NAME, tag)
    check_manifest(shard_set, folder, record.values.manifest_hash)
    if shard_set.remote is not None:
        expected = {sidecar_path(folder, entry.name).name for entry in shard_set.manifest.shards}
        files = {name: file for name, file in record.files.items() if name in expected}
        shard_set.remote.fetch_sidecars(f"labels/{tag}", files)
    if problems := label_problems(shard_set, tag, record):
        raise UsageError(f"{folder}: {problems[0]}; {_mend(tag, record)}")
    return record


def label_problems(shard_set: ShardSet, tag: str, record: LabelRecord) -> list[str]:
    """What is wrong with the files of ``record``, in words; [] if all is well."""
    return file_problems(labels_folder(shard_set.folder, tag), record.files)


def _mend(tag: str, record: LabelRecord) -> str:
    if record.values_tag == tag:
        return AGAIN
    command = f"'recap-ds labels rethreshold' from the tag '{record.values_tag}'"
    return f"remove {LABELS_NAME} there and make them again with {command}"


def read_labels(shard_set: ShardSet, tag: str) -> tuple[LabelRecord, LabelColumns]:
    """Every sample's labels; UsageError as ``read_label_record``."""
    return read_label_record(shard_set, tag), _read_columns(shard_set, tag)


def _read_columns(shard_set: ShardSet, tag: str) -> LabelColumns:
    folder = labels_folder(shard_set.folder, tag)
    table = read_all(shard_set, folder, ["value", "return", "advantage", "indicator"])
    indicator = table["indicator"].combine_chunks().dictionary_encode()
    ids = np.array([INDICATOR_IDS[name] for name in indicator.dictionary.to_pylist()], np.int64)
    value, returns, advantage = (floats(table[name]) for name in ("value", "return", "advantage"))
    return LabelColumns(value, returns, advantage, ids[indicator.indices.to_numpy()])
