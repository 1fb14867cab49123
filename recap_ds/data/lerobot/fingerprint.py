"""One checksum over what an import reads, by which it is known again.

Tables count by every byte. Videos, which hold nearly all of them, count by size and both ends: the containers keep
their index there, so that another encoding of the same frames shows.
"""

import hashlib
from pathlib import Path

from recap_ds.data.lerobot.metadata import DatasetMetadata
from recap_ds.data.lerobot.recorded import PROGRESS_SIDECAR
from recap_ds.data.lerobot.tables import one_line
from recap_ds.errors import UsageError
from recap_ds.files.records import record_files

VIDEO_END_BYTES = 2**20


def dataset_fingerprint(metadata: DatasetMetadata, labels: Path | None) -> str:
    root = metadata.root
    tables = {path for path in (root / "meta").rglob("*") if path.is_file()}
    tables |= {entry.data_path for entry in metadata.episodes}
    tables |= {path for path in (root / PROGRESS_SIDECAR, labels) if path is not None and path.is_file()}
    # Pictures beside the tables, which name them.
    videos = {path for path in (root / "images").rglob("*") if path.is_file()}
    videos |= {span.path for entry in metadata.episodes for span in entry.videos.values()}
    digest = hashlib.sha256()
    try:
        names = sorted(tables)
        for path, record in zip(names, record_files(names), strict=True):
            digest.update(f"{_name(path, root)} {record.bytes} {record.sha256}\n".encode())
        for path in sorted(videos):
            digest.update(f"{_name(path, root)} {_ends(path)}\n".encode())
    except OSError as error:
        raise UsageError(f"{root}: cannot be read ({one_line(error)}); copy the data set again") from error
    return digest.hexdigest()


def _name(path: Path, root: Path) -> str:
    """A data set that was moved is the same."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else "labels"


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(VIDEO_END_BYTES))
        file.seek(max(size - VIDEO_END_BYTES, 0))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"
