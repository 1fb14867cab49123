"""What a critic said of every sample, beside the shards.

    values/<tag>/values.json  <shard>.parquet    key, episode, frame, value, action_advantage (of an IQL critic)
                              <shard>.json       the file's checksum, and the job it is of: written last

values.json says whose values these are and names the shards by their manifest's hash. A shard is done when its own
JSON says so of the file that is there: one that another job left, or that was changed since, counts for nothing.

    n samples of a shard   N samples of the set
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from pydantic import ValidationError

from recap_ds.data.label_records import (
    FORMAT_VERSION,
    VALUES_NAME,
    ValuesFileRecord,
    ValuesRecord,
    load_record,
    save_record,
)
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.sidecars import (
    AGAIN,
    check_manifest,
    floats,
    identity_columns,
    make_folder,
    nullable,
    read_all,
    read_table,
    sidecar_path,
    unknown_tag,
    write_table,
)
from recap_ds.errors import UsageError
from recap_ds.files.records import file_problems, read_checked_json, record_file


class StoredValues(NamedTuple):
    record: ValuesRecord
    value: np.ndarray  # [N] float32, NaN = the sample could not be read
    action_advantage: np.ndarray | None  # [N] float32, NaN = no TD window; None of a distributional critic
    key_rank: np.ndarray  # [N] int64, place of the sample's key among all keys


def values_folder(shards: str | Path, tag: str) -> Path:
    return Path(shards) / "values" / tag


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
    make_folder(folder)
    save_record(record, folder / VALUES_NAME)
    return folder


def write_values(
    shard_set: ShardSet,
    folder: Path,
    shard: int,
    record: ValuesRecord,
    value: np.ndarray,
    action_advantage: np.ndarray | None,
) -> None:
    """[n], [n] float32 of one shard's samples in tar order, NaN where there is none; whole or not at all."""
    columns = identity_columns(shard_set, shard) | {"value": nullable(value)}
    if action_advantage is not None:
        columns["action_advantage"] = nullable(action_advantage)
    path = sidecar_path(folder, shard_set.manifest.shards[shard].name)
    write_table(path, columns)
    num_unread = int(np.isnan(value).sum())
    done = ValuesFileRecord(job=record.content_hash(), num_unread=num_unread, file=record_file(path))
    save_record(done, path.with_suffix(".json"))


def values_problem(shard_set: ShardSet, folder: Path, shard: int, record: ValuesRecord) -> str | None:
    """Why the shard has no values of the job ``record``, in words; None where it has them, whole."""
    path = sidecar_path(folder, shard_set.manifest.shards[shard].name)
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        done = _file_record(path)
    except UsageError as error:
        return f"{path.name} cannot be checked ({error})"
    if done.job != record.content_hash():
        return f"{path.name} is of another job than {VALUES_NAME}"
    return next(iter(file_problems(folder, {path.name: done.file})), None)


def unread_samples(shard_set: ShardSet, folder: Path, shard: int) -> np.ndarray:
    """Ids of the shard's samples that could not be read when its values were made."""
    if not _file_record(sidecar_path(folder, shard_set.manifest.shards[shard].name)).num_unread:
        return np.empty(0, np.int64)
    value = read_table(shard_set, folder, shard, ["value"])["value"]
    return shard_set.shard_starts[shard] + np.flatnonzero(pc.is_null(value).to_numpy())


def read_values(shard_set: ShardSet, tag: str) -> StoredValues:
    """Every sample's values; UsageError where the shards are others, or a shard's values are missing or damaged."""
    folder = values_folder(shard_set.folder, tag)
    if not (folder / VALUES_NAME).is_file():
        raise unknown_tag(shard_set.folder, "values", VALUES_NAME, tag)
    record = load_record(ValuesRecord, folder / VALUES_NAME)
    check_manifest(shard_set, folder, record.manifest_hash)
    for shard in range(len(shard_set.manifest.shards)):
        if problem := values_problem(shard_set, folder, shard, record):
            raise UsageError(f"{folder}: {problem}; {AGAIN}")
    names = ["value"] + (["action_advantage"] if record.value.critic == "iql" else [])
    table = read_all(shard_set, folder, names)
    order = pc.sort_indices(table["key"]).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    advantage = floats(table["action_advantage"]) if "action_advantage" in names else None
    return StoredValues(record, floats(table["value"]), advantage, rank)


def _file_record(path: Path) -> ValuesFileRecord:
    """Of one shard's values; UsageError where there is none to trust."""
    values = read_checked_json(path.with_suffix(".json"), FORMAT_VERSION)
    try:
        return ValuesFileRecord.model_validate(values)
    except ValidationError:
        raise UsageError(f"{path.with_suffix('.json')}: is not as this version writes it") from None
