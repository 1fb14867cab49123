"""Reproducible tars: the same samples give the same bytes, with index and sha256 made while writing."""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from recap_ds.data.index import IndexBuilder, SampleRecord, ShardIndex, members_crc


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class WrittenTar:
    index: ShardIndex
    bytes: int
    sha256: str


class TarWriter:
    """One shard, written in sequence. Members of a sample are sorted by name; times and owners are fixed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish() or __exit__
        self._sha256 = hashlib.sha256()
        self._builder = IndexBuilder()
        self._position = 0

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str, record: SampleRecord, members: dict[str, bytes]) -> None:
        """``members``: suffix -> bytes, without the record, which becomes ``<key>.json``."""
        members = {**members, "json": record.model_dump_json().encode()}
        places = {}
        for suffix in sorted(members):
            data = members[suffix]
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size, header.mode = len(data), 0o644
            self._write(header.tobuf(tarfile.GNU_FORMAT))
            places[suffix] = (self._position, len(data))
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self._builder.add(key, record, places, members_crc(members))

    def finish(self) -> WrittenTar:
        """End the archive and flush it to the disk."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._position + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return WrittenTar(self._builder.build(), self._position, self._sha256.hexdigest())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)
