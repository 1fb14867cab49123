"""A shard folder that is elsewhere: its manifest, indices and labels, brought here when it is opened.

    sets/<manifest hash>/  manifest.json  <shard>.index.npz  labels/<tag>/...    as in a local folder, without the tars
                           .lock          held by the process that fetches them

The tars come one by one, as they are read, through ``cache.py``.
"""

import io
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.cache import ShardCache, held
from recap_ds.data.fetch import FileLost, fetch_file
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from recap_ds.data.remote import Origin, open_origin
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file
from recap_ds.files.records import FileRecord, record_file

CHECKSUM = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 2**28  # a million shards
MAX_INDEX_BYTES = 2**30
NUM_FETCHERS = 16  # small files: the way there takes the time
# What a run asks for before it starts: somebody waits at the terminal, perhaps for an address that has a typing error.
START_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class RemoteSet:
    origin: Origin
    cache: ShardCache
    folder: Path  # here; see the module
    manifest: Manifest

    @classmethod
    def open(cls, place: str, cache: ShardCache) -> "RemoteSet":
        """Fetch the manifest, and the indices that are not here yet. UsageError where the set is not one."""
        remote = cls.find(place, cache)
        for lost in remote.fetch_indices().values():
            mend = "run 'recap-ds shards index' on a copy of the set, and upload what it writes"
            raise UsageError(f"{remote.origin.place}: {lost}; {mend}")
        return remote

    @classmethod
    def find(cls, place: str, cache: ShardCache) -> "RemoteSet":
        """Fetch the manifest alone."""
        origin = open_origin(place)
        cache.prepare()
        try:
            data = _read_whole(origin, MANIFEST_NAME, cache, MAX_MANIFEST_BYTES)
        except FileLost as lost:
            raise UsageError(f"data.shards: {origin.place}: {lost}; give the address of a shard folder") from None
        manifest = Manifest.parse(data, origin.place)
        for entry in manifest.shards:
            # They become names and sizes of files here.
            if not CHECKSUM.fullmatch(entry.sha256) or entry.bytes <= 0:
                raise UsageError(f"{origin.place}/{MANIFEST_NAME}: {entry.name} has an impossible sha256 or size")
        largest = max((entry.bytes for entry in manifest.shards), default=0)
        if largest > cache.max_bytes:
            raise UsageError(
                f"data.max_cache_gib: {cache.max_bytes / 2**30:.3g} is less than the largest shard of {origin.place} "
                f"({largest / 2**30:.3g} GiB); a run reads several at a time"
            )
        folder = cache.folder / "sets" / manifest.content_hash()[:32]
        with cache.usable():
            folder.mkdir(parents=True, exist_ok=True)
            with held(folder / ".lock"):
                if not (folder / MANIFEST_NAME).exists():
                    manifest.save(folder)
        return cls(origin, cache, folder, manifest)

    def fetch_indices(self) -> dict[str, str]:
        """Those that are not here yet. Returns shard -> what is wrong with its index, where it is lost or damaged."""
        with self.cache.usable(), held(self.folder / ".lock"), ThreadPoolExecutor(NUM_FETCHERS) as pool:
            missing = [
                entry for entry in self.manifest.shards if not ShardIndex.path_of(self.folder / entry.name).exists()
            ]
            lost = zip(missing, pool.map(self._fetch_index, missing), strict=True)
            return {entry.name: what for entry, what in lost if what is not None}

    def open_shard(self, entry: ShardEntry) -> int:
        """A descriptor; until it is closed, the shard stays in the cache. Raises FileLost and RunFailed."""
        return self.cache.open(self.origin, entry)

    def fetch_sidecar(self, name: str, max_bytes: int) -> None:
        """Make a file beside the manifest, by its relative name, what it is there now; none where there is none."""
        with self.cache.usable(), held(self.folder / ".lock"):
            self._fetch_sidecar(name, max_bytes)

    def fetch_sidecars(self, folder: str, files: Mapping[str, FileRecord]) -> None:
        """Files of a relative folder that are not here as recorded. Whoever reads them checks them."""
        here = self.folder / folder
        with self.cache.usable(), held(self.folder / ".lock"), ThreadPoolExecutor(NUM_FETCHERS) as pool:
            wanted = [name for name in files if not (here / name).exists() or record_file(here / name) != files[name]]
            list(pool.map(lambda name: self._fetch_sidecar(f"{folder}/{name}", files[name].bytes), wanted))

    def _fetch_sidecar(self, name: str, max_bytes: int) -> None:
        path = self.folder / name
        try:
            data = _read_whole(self.origin, name, self.cache, max_bytes)
        except FileLost:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)

    def _fetch_index(self, entry: ShardEntry) -> str | None:
        path = ShardIndex.path_of(self.folder / entry.name)
        part = path.with_name(f".part.{path.name}")
        with open(part, "w+b") as file:
            try:
                fetch_file(
                    self.origin,
                    path.name,
                    file,
                    max_bytes=MAX_INDEX_BYTES,
                    patience_seconds=_patience(self.cache),
                    problem=partial(_index_problem, part, entry),
                )
            except FileLost as lost:
                return str(lost)
        part.replace(path)
        return None


def _index_problem(path: Path, entry: ShardEntry, record: FileRecord) -> str | None:
    """An index has no checksum in the manifest, but its own format tells what was cut off or changed."""
    if record.bytes > MAX_INDEX_BYTES:
        return f"more than {MAX_INDEX_BYTES} bytes"
    try:
        index = ShardIndex.load(path)
    except UsageError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    if index.num_samples != entry.num_samples or (index.source != SOURCE_IDS[entry.source]).any():
        return f"is not of this shard, which has {entry.num_samples} {entry.source} samples by the manifest"
    return None


def _read_whole(origin: Origin, name: str, cache: ShardCache, max_bytes: int) -> bytes:
    def problem(record: FileRecord) -> str | None:
        return f"more than {max_bytes} bytes" if record.bytes > max_bytes else None

    buffer = io.BytesIO()
    fetch_file(origin, name, buffer, max_bytes=max_bytes, patience_seconds=_patience(cache), problem=problem)
    return buffer.getvalue()


def _patience(cache: ShardCache) -> float:
    return min(cache.patience_seconds, START_PATIENCE_SECONDS)
