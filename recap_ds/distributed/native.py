"""Whole tensors out of DeepSpeed's own checkpoint folders, by DeepSpeed's own reader. One process, no process group.

DeepSpeed pickles: open only folders that you or people you trust have written. What is frozen there (target networks
among it) was rounded to the precision of the forward, and there are no averages.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from recap_ds.errors import UsageError

OPTIMIZER_FILES = "*_optim_states.pt"


class NativeTensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # puts the ranks' pieces together


def is_native(folder: Path) -> bool:
    """Whether ``folder`` holds the files of one ZeRO checkpoint: the folder named by the tag."""
    return folder.is_dir() and any(folder.glob(OPTIMIZER_FILES))


def open_native(folder: Path) -> dict[str, NativeTensor]:
    """Every parameter, trainable (float32) and frozen, by name in the model; the trainable ones are mapped."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ModuleNotFoundError:
        raise UsageError(f"{folder}: DeepSpeed's own format needs the package deepspeed to be read") from None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it reports progress by print
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    except Exception as error:  # unpickling raises anything; each becomes the same advice
        reason = str(error).split("\n")[0][:160]
        raise UsageError(f"{folder}: DeepSpeed cannot read its checkpoint ({reason}); choose another") from None
    return {name: NativeTensor(tuple(tensor.shape), tensor.contiguous) for name, tensor in found.items()}
