"""Ranges read from safetensors files; what is no whole file is said so."""

import json

import pytest
import torch
from safetensors.torch import save_file

from recap_ds.errors import UsageError
from recap_ds.files import tensors
from recap_ds.files.tensor_reader import TensorFileReader
from recap_ds.files.tensors import write_tensor_file

VALUES = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.tensor([1.5, -2.0, 3.0]).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7.0),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path):
    save_file(VALUES, tmp_path / "x.safetensors", {"a": "b"})
    return tmp_path / "x.safetensors"


def test_it_reads_what_safetensors_wrote(file):
    reader = TensorFileReader(file)
    assert reader.metadata == {"a": "b"} and reader.tensors.keys() == VALUES.keys()
    for name, expected in VALUES.items():
        found = reader.tensor(name).whole()
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert reader.read("matrix", 3, 6).tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert reader.read("half", 2, 1).tolist() == [3.0]


@pytest.mark.parametrize("piece", [1, 5, 12, 100])
def test_pieces_of_any_size_make_up_the_tensor(file, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensors, "PIECE_ELEMENTS", piece)
    reader = TensorFileReader(file)
    sources = {name: reader.source(name) for name in VALUES}
    assert max(len(part) for part in sources["matrix"].pieces()) == min(piece, 12)
    assert all(torch.equal(sources[name].read(), expected) for name, expected in VALUES.items())
    write_tensor_file(tmp_path / "copy", {name: source.cast(torch.float32) for name, source in sources.items()})
    copy = TensorFileReader(tmp_path / "copy")
    assert all(torch.equal(copy.tensor(name).whole(), expected.float()) for name, expected in VALUES.items())


def test_a_file_that_was_deleted_is_read_to_its_end(file):
    reader = TensorFileReader(file)
    file.unlink()
    assert torch.equal(reader.tensor("matrix").whole(), VALUES["matrix"])
    with pytest.raises(UsageError, match=r"x\.safetensors: cannot be read \(No such file"):
        TensorFileReader(file)


def test_a_file_that_shrinks_while_it_is_read(file):
    reader = TensorFileReader(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="it ends too early"):
        reader.tensor("matrix").whole()


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234",
        (10**15).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"half",
        (2).to_bytes(8, "little") + b"[]",
        header(a=3),
        header(a={"dtype": "F32", "shape": [2]}),
        header(a={"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}) + b"1234",
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"1234",
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"12345678",
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + b"1234",
    ],
)
def test_what_is_no_whole_file_is_one_line(tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"/x: cannot be read \(no whole safetensors file"):
        TensorFileReader(path)
