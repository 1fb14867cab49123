"""Files that can be trusted later: flushed when written, and recorded by size and sha256.

Checkpoints and exports list their files this way, so that a truncated, changed or missing one is found before use.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

HASH_BLOCK_BYTES = 2**22
MAX_HASH_THREADS = 8  # sha256 releases the interpreter lock; beyond this the disk is the limit


class FileRecord(NamedTuple):
    bytes: int
    sha256: str


def write_text(path: Path, text: str) -> FileRecord:
    """A small file, flushed to the disk."""
    data = text.encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_file(path: Path) -> None:
    """Flush a file that was written by other means."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def record_file(path: Path) -> FileRecord:
    """Size and checksum of a file that is there already."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            sha256.update(block)
        return FileRecord(file.tell(), sha256.hexdigest())


def record_files(paths: Sequence[Path]) -> list[FileRecord]:
    with ThreadPoolExecutor(MAX_HASH_THREADS) as pool:
        return list(pool.map(record_file, paths))


def size_problems(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Which of ``files`` (relative names) are missing or have another size, in words. Reads none of them."""
    problems = []
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
    return problems


def file_problems(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is wrong with ``files`` (relative names) in words: missing, of another size, or changed; [] if all is well.

    Sizes first: they find a truncated file without reading gigabytes.
    """
    if problems := size_problems(folder, files):
        return problems
    found = record_files([folder / name for name in files])
    return [
        f"{name} was changed or damaged (its checksum differs)"
        for (name, record), now in zip(files.items(), found, strict=True)
        if now.sha256 != record.sha256
    ]


class CheckedRecord(BaseModel):
    """A JSON file that says what it is: of one format version, with a checksum over all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    FILE_NAME: ClassVar[str]
    MEANING: ClassVar[str]  # for the error: "an export's record"
    FORMAT_VERSION: ClassVar[int]

    def save(self, folder: Path) -> None:
        body = {"format_version": self.FORMAT_VERSION, **self.model_dump(mode="json")}
        write_checked_json(folder / self.FILE_NAME, body)

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / cls.FILE_NAME
        body = read_checked_json(path, cls.FORMAT_VERSION)
        del body["format_version"]
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise UsageError(f"{path}: is not {cls.MEANING} ('{place}')") from None


def write_checked_json(path: Path, body: Mapping[str, Any]) -> None:
    """``body``, which names its ``format_version``, with a checksum over all of it; whole, or not there."""
    write_file(path, (json.dumps({"sha256": _json_checksum(body), **body}, indent=1) + "\n").encode())


def read_checked_json(path: Path, format_version: int) -> dict[str, Any]:
    """What ``write_checked_json`` wrote, or UsageError."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UsageError(f"{path}: is cut off or not JSON") from None
    if not isinstance(body, dict) or not {"sha256", "format_version"} <= body.keys():
        raise UsageError(f"{path}: was not written by recap_ds")
    if body["format_version"] != format_version:
        raise UsageError(f"{path}: has format {body['format_version']}; this version reads format {format_version}")
    if body.pop("sha256") != _json_checksum(body):
        raise UsageError(f"{path}: was changed or damaged (its checksum differs)")
    return body


def _json_checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
