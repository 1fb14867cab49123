"""Whole tensors out of DeepSpeed's own checkpoint folders. One process, no process group.

DeepSpeed pickles: open only folders that you or people you trust have written. What is frozen there (target networks
among it) was rounded to the precision of the forward, and there are no averages.

The files of ZeRO-3 are not loaded: unpickled onto the meta device, a tensor says where in the file its values lie, and
they are read from there, a piece at a time. (DeepSpeed's own reader loads all that is frozen and maps the rest.)
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recap_ds.errors import UsageError
from recap_ds.files.tensor_reader import ValueFile
from recap_ds.files.tensors import TensorSource

OPTIMIZER_FILES = "*_optim_states.pt"
# A stage-3 checkpoint has one of these per rank, the others have one of another name.
MODEL_FILES = "zero_pp_rank_*_mp_rank_00_model_states.pt"


class NativeCheckpoint(NamedTuple):
    world: int  # ranks that wrote it
    tensors: dict[str, TensorSource]  # every parameter, trainable (float32) and frozen, by name in the model


def native_folder(path: Path) -> Path | None:
    """The folder of one ZeRO checkpoint that ``path`` means: itself, or the tag in its ``latest`` file; else None."""
    latest = path / "latest"
    for folder in (path, path / latest.read_text(errors="replace").strip() if latest.is_file() else path):
        if folder.is_dir() and any(folder.glob(OPTIMIZER_FILES)):
            return folder
    return None


def open_native(folder: Path) -> NativeCheckpoint:
    """UsageError where DeepSpeed's files are damaged or incomplete."""
    try:
        optimizer_files = _by_rank(folder, OPTIMIZER_FILES)
        if model_files := _by_rank(folder, MODEL_FILES):
            return _open_zero3(optimizer_files, model_files)
        return NativeCheckpoint(len(optimizer_files), _open_by_deepspeed(folder))
    except ModuleNotFoundError as error:
        raise UsageError(f"{folder}: DeepSpeed's own format needs the package {error.name} to be read") from None
    except Exception as error:  # unpickling raises anything; each becomes the same advice
        reason = str(error).split("\n")[0][:160]
        raise UsageError(f"{folder}: DeepSpeed's checkpoint cannot be read ({reason}); choose another") from None


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files in rank order: their names do not pad the rank."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


class _Run(NamedTuple):
    """Consecutive values in a file."""

    file: ValueFile
    offset: int  # bytes
    length: int
    dtype: torch.dtype

    @classmethod
    def of(cls, file: ValueFile, tensor: Tensor) -> "_Run":
        """``tensor`` was unpickled onto the meta device, its values are in ``file``."""
        start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        return cls(file, start, tensor.numel(), tensor.dtype)

    def part(self, start: int, length: int) -> "_Run":
        return self._replace(offset=self.offset + start * self.dtype.itemsize, length=length)

    def read(self) -> Tensor:
        return self.file.read(self.offset, self.length, self.dtype)


def _open_zero3(optimizer_files: Sequence[Path], model_files: Sequence[Path]) -> NativeCheckpoint:
    """Every parameter is cut into one part per rank, the last of them padded; a rank's parts follow each other in its
    flat groups, in the order of ``param_shapes``, and may cross from one group into the next."""
    flat = [_flat_groups(path, len(optimizer_files)) for path in optimizer_files]
    states = [_unpickle(path) for path in model_files]
    world = len(flat)
    if len(states) != world:
        raise ValueError(f"{world} ranks wrote optimizer states and {len(states)} model states")
    tensors = {}
    position = 0  # in every rank's flat values
    for shapes in states[0]["param_shapes"]:
        for name, shape in shapes.items():
            width = -(-shape.numel() // world)
            parts = [list(_cut(runs, position, width)) for runs in flat]
            tensors[name] = _source(shape, torch.float32, width, parts)
            position += width
    for runs in flat:
        if sum(run.length for run in runs) != position:
            raise ValueError("its flat groups are not as long as the parameters")
    files = [ValueFile(path) for path in model_files]
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        fragments = [
            _Run.of(file, state["frozen_param_fragments"][name]) for file, state in zip(files, states, strict=True)
        ]
        tensors[name] = _source(shape, torch.float32, fragments[0].length, [[run] for run in fragments])
    for alias, name in dict(states[0]["shared_params"]).items():
        tensors[alias] = tensors[name]
    return NativeCheckpoint(world, tensors)


def _flat_groups(path: Path, world: int) -> list[_Run]:
    """A rank's float32 masters, one run after the other."""
    state = _unpickle(path)["optimizer_state_dict"]
    if state["partition_count"] != world:
        raise ValueError(f"{state['partition_count']} ranks wrote it and the files of {world} are there")
    file = ValueFile(path)
    return [_Run.of(file, group) for group in state["fp32_flat_groups"]]


def _unpickle(path: Path) -> dict[str, Any]:
    """Without reading the values of any tensor."""
    return torch.load(path, map_location="meta", weights_only=False)


def _cut(runs: Sequence[_Run], start: int, length: int) -> Iterator[_Run]:
    """Values ``start`` to ``start + length`` of ``runs`` laid end to end."""
    begins = accumulate((run.length for run in runs), initial=0)
    for begin, run in zip(begins, runs, strict=False):
        first, last = max(start, begin), min(start + length, begin + run.length)
        if first < last:
            yield run.part(first - begin, last - first)


def _source(shape: torch.Size, dtype: torch.dtype, width: int, parts: Sequence[Sequence[_Run]]) -> TensorSource:
    """A parameter of which every rank has ``width`` values."""

    def read(start: int, length: int) -> Tensor:
        pieces = []
        for rank, runs in enumerate(parts):
            first, last = max(start, rank * width), min(start + length, (rank + 1) * width)
            if first < last:
                pieces += [run.read() for run in _cut(runs, first - rank * width, last - first)]
        return torch.cat(pieces)

    return TensorSource.ranges(tuple(shape), dtype, read)


def _open_by_deepspeed(folder: Path) -> dict[str, TensorSource]:
    """Stages 1 and 2, by DeepSpeed's own reader, which needs memory for all of it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(sys.stderr):  # it reports progress by print
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    return {
        name: TensorSource(tuple(tensor.shape), torch.float32, partial(_whole, tensor))
        for name, tensor in found.items()
    }


def _whole(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.contiguous().view(-1)


def zero_to_fp32(checkpoint: str, out: str, max_shard_bytes: int) -> None:
    """DeepSpeed's own conversion of the folder ``checkpoint`` to float32 safetensors: what ours is compared with."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    folder = Path(checkpoint)
    convert_zero_checkpoint_to_state_dict(
        str(folder.parent), out, max_shard_size=max_shard_bytes, safe_serialization=True, tag=folder.name
    )
