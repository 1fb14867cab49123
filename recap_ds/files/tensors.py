"""Safetensors files written as a stream: a piece of one tensor in memory at a time.

safetensors' own ``save_file`` wants every tensor in memory at once. A shard of a large model lives on an accelerator, a
consolidated one in many files, so here the header is written first, from shapes alone, and the tensors follow one by
one. The format: 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), then the values.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.files.records import FileRecord

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# What is held of a tensor while it passes through, in elements: 32 MiB of float32.
PIECE_ELEMENTS = 2**23


class TensorSource(NamedTuple):
    """A tensor that is read only when its turn to be written comes, and then a piece at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # as written; the pieces may have another
    pieces: Callable[[], Iterator[Tensor]]  # 1-D, one after the other the flattened tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSource":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: iter([tensor.reshape(-1)]))

    @classmethod
    def ranges(cls, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[int, int], Tensor]) -> "TensorSource":
        """``read(start, length)`` gives that range of the flattened tensor."""
        end = torch.Size(shape).numel()

        def pieces() -> Iterator[Tensor]:
            for start in range(0, end, PIECE_ELEMENTS):
                yield read(start, min(PIECE_ELEMENTS, end - start))

        return cls(shape, dtype, pieces)

    def cast(self, dtype: torch.dtype) -> "TensorSource":
        return self._replace(dtype=dtype)

    def read(self) -> Tensor:
        """All of it, in the dtype of the pieces."""
        pieces = list(self.pieces())
        return torch.cat(pieces).view(self.shape) if pieces else torch.empty(self.shape, dtype=self.dtype)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFileWriter:
    """Header at once, then every tensor in the order of ``specs``; flushed to the disk by ``finish``."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._specs = list(specs.values())
        self._num_written = 0
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish() or __exit__
        # "format" is what transformers asks a safetensors file for.
        header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        for name, (shape, dtype) in specs.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the values
        self._write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, tensor: Tensor) -> None:
        """The next tensor, cast to the dtype promised for it."""
        shape, _ = self._specs[self._num_written]
        assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
        self.write_pieces(iter([tensor.reshape(-1)]))

    def write_pieces(self, pieces: Iterator[Tensor]) -> None:
        """The next tensor, cast to the dtype promised for it, from 1-D pieces: one of them in memory at a time."""
        shape, dtype = self._specs[self._num_written]
        self._num_written += 1
        num_missing = torch.Size(shape).numel()
        for piece in pieces:
            num_missing -= piece.numel()
            values = piece.detach().to("cpu", dtype).contiguous().view(torch.uint8)
            self._write(values.numpy().data)
        assert num_missing == 0, (shape, num_missing)

    def finish(self) -> FileRecord:
        assert self._num_written == len(self._specs), "a promised tensor was not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._bytes, self._sha256.hexdigest())

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)


def write_tensor_file(
    path: Path, sources: Mapping[str, TensorSource], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """All of ``sources``, one piece of one of them in memory at a time."""
    specs = {name: (source.shape, source.dtype) for name, source in sources.items()}
    with TensorFileWriter(path, specs, metadata) as writer:
        for source in sources.values():
            writer.write_pieces(source.pieces())
        return writer.finish()
