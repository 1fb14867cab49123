import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from recap_ds.checkpoint.tile_file import StoredTile, TileReader, write_tile_file
from recap_ds.errors import UsageError
from recap_ds.files.records import record_file
from recap_ds.files.tensors import TensorFileWriter, TensorSource, write_tensor_file


def test_what_is_streamed_is_what_safetensors_reads(tmp_path):
    tensors = {
        "float": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "count": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0),
        "turned": torch.randn(4, 6).T,
    }
    path = tmp_path / "x.safetensors"
    record = write_tensor_file(path, {name: TensorSource.of(tensor) for name, tensor in tensors.items()}, {"a": "b"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert record == record_file(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0 and header["__metadata__"] == {"format": "pt", "a": "b"}


def test_a_source_is_read_when_its_turn_comes_and_cast(tmp_path):
    order = []

    def reading(name):
        return lambda: order.append(name) or iter([torch.ones(1), torch.full((1,), 1 + 2**-12)])

    sources = {name: TensorSource((2,), torch.float32, reading(name)).cast(torch.bfloat16) for name in "ba"}
    assert order == []
    write_tensor_file(tmp_path / "x", sources)
    assert order == ["b", "a"]
    assert load_file(tmp_path / "x")["a"].tolist() == [1.0, 1.0]


def test_a_file_that_lacks_a_promised_tensor_is_not_finished(tmp_path):
    with (
        pytest.raises(AssertionError, match="was not written"),
        TensorFileWriter(tmp_path / "x", {"a": ((1,), torch.float32)}) as writer,
    ):
        writer.finish()


@pytest.fixture
def reader(tmp_path):
    """Values 0..9 of parameter p in pieces of 4, 1 and 5, written by three ranks out of order; q by one of them."""
    values = torch.arange(10.0)
    pieces = [(5, 10), (0, 4), (4, 5)]
    paths = []
    for rank, (start, end) in enumerate(pieces):
        tiles = [StoredTile("fp32", "p", start, values[start:end]), StoredTile("ema", "p", start, -values[start:end])]
        if rank == 1:
            tiles.append(StoredTile("fp32", "q", 0, torch.tensor([7.0])))
        paths.append(tmp_path / f"{rank}.safetensors")
        write_tile_file(paths[-1], tiles)
    return TileReader(paths)


def test_any_range_comes_back_whatever_the_cuts(reader):
    for start in range(11):
        for length in range(11 - start):
            assert reader.read("fp32", "p", start, length).tolist() == list(range(start, start + length))
    assert reader.read("ema", "p", 0, 10).tolist() == (-torch.arange(10.0)).tolist()
    assert reader.names("fp32") == {"p", "q"} and reader.names("ema") == {"p"}


@pytest.mark.parametrize(
    ("kind", "name", "start", "length"), [("fp32", "q", 0, 2), ("ema", "q", 0, 1), ("x", "p", 0, 1)]
)
def test_a_gap_is_an_error(reader, kind, name, start, length):
    with pytest.raises(UsageError, match=f"holds values .* of {kind} of '{name}'"):
        reader.read(kind, name, start, length)


def test_a_rank_without_any_tile_writes_a_readable_file(tmp_path):
    write_tile_file(tmp_path / "0", [])
    assert TileReader([tmp_path / "0"]).names("fp32") == set()
