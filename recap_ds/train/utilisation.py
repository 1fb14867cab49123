"""Model FLOPs utilisation: the useful operations of a step over what the device could do in the time it took.

Counted once, at start, on the meta device, from the forward and backward of the stage: what a frozen VLM or LoRA spares
is not counted, and neither is recomputation, which is work but no progress.
"""

from typing import NamedTuple

import torch

from recap_ds.distributed.runtime import accelerator_name
from recap_ds.models.vlm_weights import locate_vlm
from recap_ds.plan.hardware import find_gpu
from recap_ds.plan.measure import count_model_flops
from recap_ds.train.session import Session

STEP_TIME, NAME = "time/step_p50_seconds", "train/mfu"


class Utilisation(NamedTuple):
    flops: int  # of one rank in one optimizer step
    peak_flops: float | None  # of its device, per second; None where that is not known

    @classmethod
    def of(cls, session: Session) -> "Utilisation":
        """Of rank 0, which writes the metrics; the others have nothing to count."""
        plan = session.plan
        given, gpu = plan.config.logging.peak_tflops, find_gpu(accelerator_name(session.runtime.device) or "")
        if (given is None and gpu is None) or not plan.info.is_main:
            return cls(0, None)
        peak = given * 1e12 if given is not None else gpu.peak_flops(plan.precision.dtype == torch.bfloat16)
        folder = plan.start.vlm if plan.start else locate_vlm(plan.config.vlm_source)
        num_cameras = len(plan.contract.slots)
        flops = count_model_flops(plan.config, plan.precision.dtype, folder and str(folder), num_cameras)
        return cls(flops * plan.sizes.accumulation, peak)

    def add_to(self, timings: dict[str, float]) -> dict[str, float]:
        """``timings`` with the share of the peak that the median step reached, where the peak is known."""
        if self.peak_flops is None:
            return timings
        return {**timings, NAME: self.flops / (timings[STEP_TIME] * self.peak_flops)}
