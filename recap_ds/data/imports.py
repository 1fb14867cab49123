"""``imports.json``: which data sets a shard folder holds and how each was imported, so that the same again is known.

An import is the same where its source files and everything that decides the bytes of its shards are the same. The file
is written just before the manifest that lists an import's shards; without them its entry says nothing.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.errors import UsageError
from recap_ds.files.records import CheckedRecord

# What decides an import's shards, by name: options, and a checksum over the source files. Plain JSON.
ImportJob = dict[str, Any]


class ImportRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    job: ImportJob
    num_episodes: int
    shards: dict[str, str]  # name -> sha256


class ImportsFile(CheckedRecord):
    FILE_NAME: ClassVar[str] = "imports.json"
    MEANING: ClassVar[str] = "a shard folder's record of imports"
    FORMAT_VERSION: ClassVar[int] = 1

    imports: dict[str, ImportRecord]  # by data set


def load_imports(folder: Path, manifest: Manifest | None) -> dict[str, ImportRecord]:
    """Of the data sets whose shards the manifest lists, all of them and unchanged."""
    if manifest is None or not (folder / ImportsFile.FILE_NAME).exists():
        return {}
    try:
        imports = ImportsFile.load(folder).imports
    except UsageError as error:
        raise UsageError(f"{error}; remove it: its imports, given again, are then refused instead of skipped") from None
    listed = {(shard.name, shard.sha256) for shard in manifest.shards}
    return {name: record for name, record in imports.items() if listed.issuperset(record.shards.items())}


def save_imports(folder: Path, imports: dict[str, ImportRecord]) -> None:
    ImportsFile(imports=imports).save(folder)


def record_import(job: ImportJob, num_episodes: int, shards: list[ShardEntry]) -> ImportRecord:
    return ImportRecord(
        job=plain_job(job), num_episodes=num_episodes, shards={shard.name: shard.sha256 for shard in shards}
    )


def plain_job(job: ImportJob) -> ImportJob:
    """As it reads back: tuples are lists in JSON."""
    return json.loads(json.dumps(job))


def is_the_same(record: ImportRecord, job: ImportJob, dataset: str, folder: Path) -> bool:
    """UsageError names what differs: one name stands for one data set, imported in one way."""
    differing = sorted(
        name for name in record.job.keys() | job.keys() if record.job.get(name) != plain_job(job).get(name)
    )
    if differing:
        raise UsageError(
            f"{folder}: data set {dataset} is there, imported with other {', '.join(differing)}; give this one another "
            f"name, or import into another folder"
        )
    return True
