"""Facts of a machine that does not exist: a node of eight A100s on which nothing is wrong."""

from typing import Any

from recap_ds.doctor.node import NodeFacts

CPU = {"device": "cpu", "model": "CPU", "count": 1, "bf16": False, "backend": "gloo"}
A100 = {"device": "cuda", "model": "A100", "count": 8, "memory_bytes": 80 * 2**30, "bf16": True, "backend": "nccl"}
NODE = NodeFacts(
    hostname="node-0",
    python="3.12.3",
    versions={"torch": "2.13.0+cu128", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2"},
    requirements={
        "torch": "<2.14,>=2.6",
        "deepspeed": "<0.20,>=0.19.8",
        "transformers": "<6,>=5.23",
        "peft": "<0.22,>=0.21.2",
    },
    source="0123456789ab",
    time=1e9,
    cpus=128,
    shared_memory_bytes=256 * 2**30,
    limits={"open_files": 65536, "processes": 100_000, "locked_bytes": -1},
    infiniband=["mlx5_0"],
    programs={"deepspeed": True, "pdsh": True, "ssh": True},
    variables={},
    accelerator={**A100, "chosen": False},
    free_port=29999,
    paths={},
)


def facts(**changes: Any) -> NodeFacts:
    return NODE._replace(**changes)
