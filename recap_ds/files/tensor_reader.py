"""Tensors read from files a range at a time, by plain reads.

safetensors' ``safe_open`` and ``torch.load(mmap=True)`` map files: what was read once stays counted as memory of the
process. Here it is the caller's to keep or to drop.
"""

import json
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.errors import UsageError
from recap_ds.files.tensors import DTYPE_NAMES, TensorSource

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class ValueFile:
    """A file with runs of numbers somewhere in it. It stays open: its owner may delete it while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self.unreadable(error.strerror) from None
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, length: int, dtype: torch.dtype) -> Tensor:
        """[length] values that begin at byte ``offset``."""
        values = torch.empty(length, dtype=dtype)
        rest = memoryview(values.view(torch.uint8).numpy())
        while rest:
            try:
                num_read = os.preadv(self.descriptor, [rest], offset)
            except OSError as error:
                raise self.unreadable(error.strerror) from None
            if num_read == 0:
                raise self.unreadable("it ends too early")
            rest, offset = rest[num_read:], offset + num_read
        return values

    def unreadable(self, reason: str) -> UsageError:
        return UsageError(f"{self.path}: cannot be read ({reason})")


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # of the first value, in bytes from the start of the file


class FileTensor(NamedTuple):
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]  # (start, length) of the flattened values

    def whole(self) -> Tensor:
        return self.read(0, torch.Size(self.shape).numel()).view(self.shape)


class TensorFileReader:
    """Any range of any tensor of a safetensors file; UsageError where it is none or is cut off."""

    def __init__(self, path: Path) -> None:
        self._file = ValueFile(path)
        try:
            self.metadata, self.tensors = _parse_header(self._file.descriptor)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._file.unreadable(f"no whole safetensors file: {error}") from None

    def read(self, name: str, start: int, length: int) -> Tensor:
        """[length] values of the flattened tensor, from ``start`` on."""
        stored = self.tensors[name]
        assert start >= 0 and start + length <= torch.Size(stored.shape).numel(), (name, start, length)
        return self._file.read(stored.offset + start * stored.dtype.itemsize, length, stored.dtype)

    def tensor(self, name: str) -> FileTensor:
        return FileTensor(self.tensors[name].shape, partial(self.read, name))

    def source(self, name: str) -> TensorSource:
        stored = self.tensors[name]
        return TensorSource.ranges(stored.shape, stored.dtype, partial(self.read, name))


def _parse_header(descriptor: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """(metadata, tensors); ValueError and its like where the file is not what the format says."""
    file_bytes = os.fstat(descriptor).st_size
    header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    begin = 8 + header_bytes
    if file_bytes < 8 or begin > file_bytes:
        raise ValueError("its header is cut off")
    header = json.loads(os.pread(descriptor, header_bytes, 8))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"'{name}' is {entry['dtype']}, which is not read here")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        if end - first != torch.Size(shape).numel() * dtype.itemsize or not 0 <= first <= end <= file_bytes - begin:
            raise ValueError(f"'{name}' is cut off")
        tensors[name] = StoredTensor(shape, dtype, begin + first)
    return metadata, tensors
