"""Sidecars of a shard folder: what a critic said of every sample, and the advantage labels made of it.

    values/<tag>/values.json  <shard>.parquet    key, episode, frame, value, action_advantage (of an IQL critic)
    labels/<tag>/labels.json  <shard>.parquet    key, episode, frame, value, return, advantage, indicator

Rows are in tar order; what is not known is null. Shards themselves are never written. Each JSON names the shards by
their manifest's hash, and labels.json, written last, holds every label file's size and sha256.

    N samples of the set   K tasks
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.data.index import ShardIndex
from recap_ds.data.label_records import LABELS_NAME, VALUES_NAME, LabelRecord, ValuesRecord, load_record, save_record
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file
from recap_ds.files.records import file_problems, record_file

INDICATOR_NAMES = {number: name for name, number in INDICATOR_IDS.items()}


class StoredValues(NamedTuple):
    record: ValuesRecord
    value: np.ndarray  # [N] float32, NaN = the sample could not be read
    action_advantage: np.ndarray | None  # [N] float32, NaN = no TD window; None of a distributional critic
    key_rank: np.ndarray  # [N] int64, place of the sample's key among all keys


class LabelColumns(NamedTuple):
    value: np.ndarray  # [N] float32, NaN = not known, here and below
    returns: np.ndarray  # [N] float32, Monte-Carlo
    advantage: np.ndarray  # [N] float32
    indicator: np.ndarray  # [N] int64, INDICATOR_IDS


@dataclass(frozen=True)
class LabelSet:
    """Labels of a whole shard set by sample id, as training reads them. Picklable."""

    record: LabelRecord
    advantage: np.ndarray  # [N] float32, 0 where it is not known
    indicator: np.ndarray  # [N] int64, INDICATOR_IDS
    sigma: np.ndarray  # [K] float32 by task id, inf where no advantage was ranked

    @classmethod
    def open(cls, shard_set: ShardSet, tag: str, max_length: Mapping[str, int] | None = None) -> "LabelSet":
        """``max_length``: the L_task that the run measures in, where it has one; labels in another are refused."""
        record, columns = read_labels(shard_set, tag)
        for task, frames in (max_length or {}).items():
            if task in record.values.max_length and record.values.max_length[task] != frames:
                raise UsageError(
                    f"value.max_length: task '{task}' is measured in {frames} frames here, in labels '{tag}' in "
                    f"{record.values.max_length[task]}; set value.max_length.{task}={record.values.max_length[task]}"
                )
        sigma = [record.tasks[task].sigma for task in shard_set.manifest.tasks]
        return cls(
            record,
            np.nan_to_num(columns.advantage, nan=0.0),
            columns.indicator,
            np.array([np.inf if value is None else value for value in sigma], np.float32),
        )


def values_folder(shards: str | Path, tag: str) -> Path:
    return Path(shards) / "values" / tag


def labels_folder(shards: str | Path, tag: str) -> Path:
    return Path(shards) / "labels" / tag


# -- values ---------------------------------------------------------------------------------------------------------


def open_values(shards: str | Path, tag: str, record: ValuesRecord) -> Path:
    """The folder of ``tag``, new or of an interrupted job that computed the same; UsageError where it is another's."""
    folder = values_folder(shards, tag)
    if (folder / VALUES_NAME).is_file():
        there = load_record(ValuesRecord, folder / VALUES_NAME)
        for name in type(record).model_fields:
            if getattr(there, name) != getattr(record, name):
                raise UsageError(
                    f"--tag {tag}: {folder} holds values of another job ({name} differs); give another tag, or remove "
                    f"that folder"
                )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_record(record, folder / VALUES_NAME)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


def values_path(folder: Path, shard: str) -> Path:
    return folder / Path(shard).with_suffix(".parquet").name


def write_values(
    shard_set: ShardSet, folder: Path, shard: int, value: np.ndarray, action_advantage: np.ndarray | None
) -> None:
    """[n], [n] float32 of one shard's samples in tar order, NaN where there is none; whole or not at all."""
    columns = _identity_columns(shard_set, shard) | {"value": _nullable(value)}
    if action_advantage is not None:
        columns["action_advantage"] = _nullable(action_advantage)
    _write_table(values_path(folder, shard_set.manifest.shards[shard].name), columns)


def read_values(shard_set: ShardSet, tag: str) -> StoredValues:
    """Every sample's values; UsageError where the shards are others or a shard has none yet."""
    folder = values_folder(shard_set.folder, tag)
    if not (folder / VALUES_NAME).is_file():
        raise _unknown_tag(shard_set.folder, "values", VALUES_NAME, tag)
    record = load_record(ValuesRecord, folder / VALUES_NAME)
    _check_manifest(shard_set, folder, record.manifest_hash)
    names = ["value"] + (["action_advantage"] if record.value.critic == "iql" else [])
    table = _read_all(shard_set, folder, names)
    order = pc.sort_indices(table["key"]).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    advantage = _floats(table["action_advantage"]) if "action_advantage" in names else None
    return StoredValues(record, _floats(table["value"]), advantage, rank)


# -- labels ---------------------------------------------------------------------------------------------------------


def write_labels(shard_set: ShardSet, tag: str, record: LabelRecord, columns: LabelColumns) -> LabelRecord:
    """All label files of ``tag``, labels.json last; ``record.files`` is filled in."""
    folder = labels_folder(shard_set.folder, tag)
    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    for shard, entry in enumerate(shard_set.manifest.shards):
        rows = slice(shard_set.shard_starts[shard], shard_set.shard_starts[shard + 1])
        path = values_path(folder, entry.name)
        indicator = pa.array(columns.indicator[rows].astype(np.int8))
        names = pa.array([INDICATOR_NAMES[number] for number in range(len(INDICATOR_NAMES))])
        _write_table(
            path,
            _identity_columns(shard_set, shard)
            | {
                "value": _nullable(columns.value[rows]),
                "return": _nullable(columns.returns[rows]),
                "advantage": _nullable(columns.advantage[rows]),
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
    record = load_label_record(shard_set.folder, tag)
    if record is None:
        raise _unknown_tag(shard_set.folder, "labels", LABELS_NAME, tag)
    _check_manifest(shard_set, folder, record.values.manifest_hash)
    if problems := file_problems(folder, record.files):
        raise UsageError(f"{folder}: {problems[0]}; remove {LABELS_NAME} there and run launch/label.py again")
    return record


def read_labels(shard_set: ShardSet, tag: str) -> tuple[LabelRecord, LabelColumns]:
    """Every sample's labels; UsageError as ``read_label_record``."""
    record, folder = read_label_record(shard_set, tag), labels_folder(shard_set.folder, tag)
    table = _read_all(shard_set, folder, ["value", "return", "advantage", "indicator"])
    indicator = table["indicator"].combine_chunks().dictionary_encode()
    ids = np.array([INDICATOR_IDS[name] for name in indicator.dictionary.to_pylist()], np.int64)
    value, returns, advantage = (_floats(table[name]) for name in ("value", "return", "advantage"))
    return record, LabelColumns(value, returns, advantage, ids[indicator.indices.to_numpy()])


# -- tables ---------------------------------------------------------------------------------------------------------


def _identity_columns(shard_set: ShardSet, shard: int) -> dict[str, pa.Array]:
    index = ShardIndex.load(ShardIndex.path_of(shard_set.folder / shard_set.manifest.shards[shard].name))
    return {
        "key": pa.array(index.keys),
        "episode": pa.array(index.episodes[index.episode]),
        "frame": pa.array(index.frame),
    }


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float32), from_pandas=True)  # NaN -> null


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, np.float32("nan")).to_numpy().astype(np.float32)


def _write_table(path: Path, columns: dict[str, pa.Array]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    try:
        write_file(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def _read_all(shard_set: ShardSet, folder: Path, columns: list[str]) -> pa.Table:
    """All shards' rows in the order of sample ids, joined by (episode, frame)."""
    tables = []
    for shard, entry in enumerate(shard_set.manifest.shards):
        path = values_path(folder, entry.name)
        if not path.is_file():
            raise UsageError(f"{path}: missing; run launch/label.py again with this tag, it goes on where it stopped")
        try:
            table = pq.read_table(path, columns=["key", "episode", "frame", *columns])
        except (OSError, pa.ArrowException) as error:
            first = str(error).splitlines()[0]
            raise UsageError(f"{path}: damaged ({first}); remove it and run launch/label.py again") from None
        rows = slice(shard_set.shard_starts[shard], shard_set.shard_starts[shard + 1])
        _check_rows(shard_set, path, table, rows)
        tables.append(table)
    return pa.concat_tables(tables)


def _check_rows(shard_set: ShardSet, path: Path, table: pa.Table, rows: slice) -> None:
    samples = shard_set.table
    wanted = [shard_set.episodes[number] for number in samples.episode[rows]]
    if (
        not np.array_equal(table["frame"].to_numpy(), samples.frame[rows])
        or table["episode"].to_pylist() != wanted
        or table["key"].null_count
    ):
        raise UsageError(f"{path}: its rows are not the shard's samples; remove it and run launch/label.py again")


def _check_manifest(shard_set: ShardSet, folder: Path, manifest_hash: str) -> None:
    now = shard_set.manifest.content_hash()
    if manifest_hash != now:
        raise UsageError(
            f"{folder}: made for other shards (manifest {manifest_hash[:12]}, {shard_set.folder} is now {now[:12]}); "
            "run launch/label.py with a new tag"
        )


def _unknown_tag(shards: Path, kind: str, name: str, tag: str) -> UsageError:
    there = sorted(path.parent.name for path in (shards / kind).glob(f"*/{name}"))
    listed = f"there are {', '.join(there)}" if there else "there are none; make some with launch/label.py"
    return UsageError(f"{shards}: no {kind} with the tag '{tag}'; {listed}")
