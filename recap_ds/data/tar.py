"""Reproducible tars: the same samples give the same bytes, with index and sha256 made while writing."""

import hashlib
import io
import math
import os
import tarfile
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.data.index import IndexBuilder, SampleRecord, ShardIndex, members_crc


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_array(data: bytes) -> np.ndarray:
    """The other way. ValueError for anything but one whole plain array; never unpickles, never trusts a size."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not read here")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read_header(buffer)
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError) as error:
        raise ValueError(f"damaged npy header ({error})") from None
    if dtype.hasobject:
        raise ValueError("an object array would need pickle")
    if math.prod(shape) * dtype.itemsize != len(data) - buffer.tell():
        raise ValueError(f"{len(data) - buffer.tell()} bytes of data for shape {list(shape)} of {dtype}")
    flat = np.frombuffer(data, dtype=dtype, offset=buffer.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


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
