"""How large checkpoints and exports of a run will be, but for a few kilobytes of JSON and headers."""

from typing import NamedTuple

import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.footprint import FP32_BYTES
from recap_ds.plan.estimate import averages_bytes
from recap_ds.plan.sizing import Sizer

VLM = "vlm."


class FileSizes(NamedTuple):
    """Bytes."""

    checkpoint: int  # of one step: masters, moments and averages, over all ranks' files
    base: int  # once per run: the frozen VLM, where no file has it
    export: int  # recap-ds consolidate, float32, with critics


def file_sizes(sizer: Sizer, config: PiStarRECAPConfig, dtype: torch.dtype) -> FileSizes:
    trainable = sum(p.numel for p in sizer.parameters if p.group)
    frozen_vlm = sum(p.numel for p in sizer.parameters if p.name.startswith(VLM) and not p.group)
    return FileSizes(
        checkpoint=3 * FP32_BYTES * trainable + averages_bytes(sizer, config, world=1),
        base=frozen_vlm * dtype.itemsize if sizer.vlm_is_random else 0,
        export=FP32_BYTES * sum(p.numel for p in sizer.parameters),
    )
