"""What accelerators this machine has, as DeepSpeed sees them: the essentials of its ``ds_report``.

DeepSpeed's table of compiled operators is left out: nothing here uses one, nothing may compile at start.
"""

import os
from typing import NamedTuple

import torch

from recap_ds.distributed.runtime import accelerator_is_cpu


class AcceleratorFacts(NamedTuple):
    device: str  # "cpu", or torch's name of the kind of accelerator
    model: str  # what the vendor calls it
    count: int  # a CPU counts as one
    memory_bytes: int  # of each
    bf16: bool
    backend: str  # of collectives
    chosen: bool  # True = DS_ACCELERATOR names it


def accelerator_facts() -> AcceleratorFacts:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device, chosen = accelerator.device_name(), "DS_ACCELERATOR" in os.environ
    if accelerator_is_cpu():
        return AcceleratorFacts("cpu", "CPU", 1, accelerator.total_memory(), False, "gloo", chosen)
    properties = torch.get_device_module(device).get_device_properties(0)
    return AcceleratorFacts(
        device,
        properties.name,
        accelerator.device_count(),
        accelerator.total_memory(0),
        accelerator.is_bf16_supported(),
        accelerator.communication_backend_name(),
        chosen,
    )
