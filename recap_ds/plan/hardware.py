"""What the makers state of GPUs and links, and the shares of it that training is assumed to reach.

Everything computed from these numbers is an estimate, and is printed as one.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    memory_gib: float
    bf16_tflops: float  # dense
    fp32_tflops: float  # tf32 off, as torch's default is
    node_gbytes: float  # per second and GPU, one direction, to the GPUs of its node
    network_gbytes: float  # per second and node, one direction: eight adapters

    def peak_flops(self, bf16: bool) -> float:
        """Per second."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)


# NVLink 3 and 4; adapters of 200 and 400 Gbit/s.
GPUS = {
    "a100-40": Gpu("A100 40 GB", 40, 312, 19.5, 300, 200),
    "a100-80": Gpu("A100 80 GB", 80, 312, 19.5, 300, 200),
    "h100": Gpu("H100 80 GB", 80, 989, 67, 450, 400),
    "h200": Gpu("H200 141 GB", 141, 989, 67, 450, 400),
}
GPUS_PER_NODE = 8


class Range(NamedTuple):
    low: float
    high: float


# Shares of the stated figures, lowest and highest.
COMPUTE_SHARE = Range(0.30, 0.55)
LINK_SHARE = Range(0.40, 0.80)
# Of a GPU's memory: context, workspaces and NCCL's buffers; and what the allocator loses on tensors that come and go.
RESERVED_GIB = 1.5
FRAGMENTATION = 0.1


def find_gpu(device_name: str) -> Gpu | None:
    """From the name that the driver gives; None of a GPU that is not in the table."""
    if "H100" in device_name and "HBM3" not in device_name:
        return None  # the PCIe card, which is slower
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0].upper() in device_name), None)
