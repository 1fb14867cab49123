"""ZeRO-3's layout, by hand: any number of ranks, parts that cross from one flat group into the next, padding."""

import pytest
import torch

from recap_ds.distributed.native import native_folder, open_native
from recap_ds.files import tensors

SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([1]), "c": torch.Size([4, 4])}


def cut(tensor, world, rank):
    """A rank's part, padded with a value that must not be read."""
    width = -(-tensor.numel() // world)
    part = tensor.flatten()[rank * width : (rank + 1) * width]
    return torch.nn.functional.pad(part, (0, width - len(part)), value=-1e9)


@pytest.fixture(params=[1, 3, 12])
def checkpoint(request, tmp_path):
    """(folder, what is in it) of so many ranks; 12 has two-digit ranks, whose names do not sort as numbers."""
    world, folder = request.param, tmp_path / "tag"
    folder.mkdir()
    trained = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    frozen = {"frozen": torch.randn(7).bfloat16()}
    for rank in range(world):
        flat = torch.cat([cut(tensor, world, rank) for tensor in trained.values()])
        groups = [flat[start : start + 4].clone() for start in range(0, len(flat), 4)]
        groups[0] = torch.cat([torch.full((3,), -1e9), groups[0]])[3:]  # a view into the middle of a storage
        optimizer = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": groups}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {
            "param_shapes": [{"a": SHAPES["a"]}, {"b": SHAPES["b"], "c": SHAPES["c"]}],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": {name: cut(tensor, world, rank) for name, tensor in frozen.items()},
            "shared_params": {"tied": "a"},
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder, world, trained | frozen | {"tied": trained["a"]}


@pytest.mark.parametrize("piece", [2, 1000])
def test_every_value_is_found(checkpoint, monkeypatch, piece):
    monkeypatch.setattr(tensors, "PIECE_ELEMENTS", piece)
    folder, world, expected = checkpoint
    found = open_native(folder)
    assert found.world == world and found.tensors.keys() == expected.keys()
    for name, source in found.tensors.items():
        assert torch.equal(source.read().float(), expected[name].float()), name


def test_the_folder_is_found_by_its_latest_file(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    assert native_folder(folder) == folder and native_folder(tmp_path) is None
    (tmp_path / "latest").write_text("tag\n")
    assert native_folder(tmp_path) == folder
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert native_folder(tmp_path) is None
