"""All or nothing: new shards are made in a hidden folder beside the old ones and join them in one step.

``.writing/`` holds spools, tars and, just before they move, the manifest that will list them. Until ``manifest.json``
is replaced the old one is valid and complete; whatever an interrupted import left is taken back by the next one, and
nothing else is ever deleted. Spools of an import that was cut off stay for the same import, which goes on with them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recap_ds.data.imports import ImportJob, ImportRecord, load_imports, plain_job, save_imports
from recap_ds.data.index import SHARD_NAME, ShardIndex
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.errors import UsageError
from recap_ds.files.atomic import sync_folder, write_file
from recap_ds.files.lock import hold_folder

JOB_NAME = "job.json"
# Kept from one attempt of an import to the next, beside the job they are of.
SPOOLS = "*.spool*"


@dataclass(frozen=True)
class Staging:
    folder: Path
    work: Path  # same file system as ``folder``, gone at the end
    manifest: Manifest | None  # None = a new folder
    imports: dict[str, ImportRecord]  # what the folder says of its data sets

    def next_number(self, source: str) -> int:
        """Of the first new shard of ``source``."""
        listed = self.manifest.shards if self.manifest else ()
        numbers = [int(SHARD_NAME.fullmatch(shard.name)[2]) for shard in listed if shard.source == source]
        return max(numbers, default=-1) + 1

    def commit(
        self, manifest: Manifest, new_shards: list[str], new_imports: dict[str, ImportRecord] | None = None
    ) -> None:
        """Move the new shards in, then put their manifest in force."""
        manifest.save(self.work)
        for name in new_shards:
            os.replace(ShardIndex.path_of(self.work / name), ShardIndex.path_of(self.folder / name))
            os.replace(self.work / name, self.folder / name)
        sync_folder(self.folder)
        if new_imports:
            save_imports(self.folder, self.imports | new_imports)
        manifest.save(self.folder)


@contextmanager
def open_staging(folder: Path, job: ImportJob | None = None) -> Iterator[Staging]:
    """A place to make new shards in; only ``commit`` lets them stay. ``job``: what is cut off goes on next time."""
    with locked(folder, job):
        manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
        _refuse_strays(folder, manifest)
        work = folder / ".writing"
        work.mkdir(exist_ok=True)
        if job is not None:
            write_file(work / JOB_NAME, json.dumps(job).encode())
        try:
            yield Staging(folder, work, manifest, load_imports(folder, manifest))
        except UsageError:
            _take_back(folder)
            raise
        except BaseException:
            _take_back(folder, job)
            raise
        _take_back(folder)


@contextmanager
def locked(folder: Path, job: ImportJob | None = None) -> Iterator[None]:
    """One writer at a time; a second one is a UsageError. What another unfinished import left is gone on entry."""
    with hold_folder(folder, f"{folder}: another process is writing shards there; wait for it"):
        _take_back(folder, job)
        yield


def _take_back(folder: Path, job: ImportJob | None = None) -> None:
    """Remove what an unfinished import moved in, and its work; spools of ``job`` stay."""
    work = folder / ".writing"
    if (work / MANIFEST_NAME).exists():
        kept = Manifest.load(folder).shards if (folder / MANIFEST_NAME).exists() else ()
        names = {shard.name for shard in Manifest.load(work).shards} - {shard.name for shard in kept}
        for name in names:
            (folder / name).unlink(missing_ok=True)
            ShardIndex.path_of(folder / name).unlink(missing_ok=True)
    if job is not None and _is_of(work, job):
        kept_work = {work / JOB_NAME, *work.glob(SPOOLS)}
        for path in set(work.iterdir()) - kept_work:
            path.unlink()
    elif work.exists():
        shutil.rmtree(work)


def _is_of(work: Path, job: ImportJob) -> bool:
    try:
        return json.loads((work / JOB_NAME).read_bytes()) == plain_job(job)
    except (OSError, ValueError):
        return False  # nothing there, or cut off while it was written: to be made anew


def _refuse_strays(folder: Path, manifest: Manifest | None) -> None:
    """A tar the manifest does not list may be someone's data: neither overwritten nor deleted."""
    listed = {shard.name for shard in manifest.shards} if manifest else set()
    strays = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    if strays:
        raise UsageError(
            f"{folder}: {strays[0]} is not in {MANIFEST_NAME}; list it with 'recap-ds shards index {folder}', "
            "or move it away"
        )
