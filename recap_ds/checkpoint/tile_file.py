"""A rank's tiles in one safetensors file, and any range of any parameter out of all of them.

Tensors are 1-D and named ``kind/parameter``; where a tile begins in its flattened parameter stands in the header. The
tiles of all ranks cover every parameter once, so a reader asks for (kind, name, start, length) and need not know how
many ranks wrote, or in which stage.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.errors import UsageError
from recap_ds.files.records import FileRecord
from recap_ds.files.tensor_reader import TensorFileReader
from recap_ds.files.tensors import TensorSource, write_tensor_file

# Of every trainable parameter; the kinds of shadows (target, ema) come on top.
MASTER = "fp32"
TARGET = "target"
EMA = "ema"


class StoredTile(NamedTuple):
    kind: str
    name: str  # of the parameter
    start: int  # in the flattened parameter
    values: Tensor  # [length] float32, live: read when its turn to be written comes


def write_tile_file(path: Path, tiles: Iterable[StoredTile]) -> FileRecord:
    sources, starts = {}, {}
    for tile in tiles:
        key = f"{tile.kind}/{tile.name}"
        assert key not in sources and tile.values.dim() == 1, key
        sources[key] = TensorSource.of(tile.values)
        starts[key] = tile.start
    return write_tensor_file(path, sources, {"starts": json.dumps(starts)})


class _Piece(NamedTuple):
    start: int
    length: int
    file: int
    key: str


class TileReader:
    """Ranges of parameters from a set of rank files: only what is asked for is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._files = [TensorFileReader(path) for path in paths]
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for index, file in enumerate(self._files):
            for key, start in json.loads(file.metadata["starts"]).items():
                kind, name = key.split("/", 1)
                length = file.tensors[key].shape[0]
                self._pieces[kind, name].append(_Piece(start, length, index, key))
        for pieces in self._pieces.values():
            pieces.sort()

    def names(self, kind: str) -> set[str]:
        return {name for stored, name in self._pieces if stored == kind}

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """[length] float32 values of the flattened parameter, from ``start`` on."""
        out = torch.empty(length, dtype=torch.float32)
        position, end = start, start + length
        for piece in self._pieces.get((kind, name), ()):
            if piece.start + piece.length <= position or position >= end:
                continue
            if piece.start > position:
                break
            until = min(end, piece.start + piece.length)
            values = self._files[piece.file].read(piece.key, position - piece.start, until - position)
            out[position - start : until - start] = values
            position = until
        if position < end:
            folder = self._paths[0].parent
            raise UsageError(f"{folder}: no rank file holds values {position} to {end} of {kind} of '{name}'")
        return out
