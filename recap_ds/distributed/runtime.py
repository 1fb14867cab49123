"""Process group, device and memory: the ranks of one job, whoever launched them.

Reads only RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE or LOCAL_SIZE and MASTER_*, so that ``deepspeed``,
``torchrun``, ``srun`` with those set, and plain ``python`` (one process) all work. Nothing here compiles: DeepSpeed's
shared-memory extension for CPUs would need g++ and 90 seconds, and is switched off.

Knows nothing of models, engines or data.
"""

import json
import logging
import os
import resource
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed

from recap_ds.distributed.interface import interface_towards
from recap_ds.errors import UsageError


class RankInfo(NamedTuple):
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1  # ranks on this node

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_rank_info(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """What the launcher said, checked; one process where nothing launched us."""
    if "RANK" not in environ:
        return RankInfo()
    rank, world = _whole_number(environ, "RANK"), _whole_number(environ, "WORLD_SIZE")
    local_rank = _whole_number(environ, "LOCAL_RANK")
    local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"  # torchrun's, deepspeed's
    # Under srun neither is set; on one node it is the world, and on several it only sets the share of CPU threads.
    local_world = _whole_number(environ, local_name) if local_name in environ else world
    if not 0 <= rank < world or not 0 <= local_rank < local_world <= world:
        raise UsageError(
            f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={world} {local_name}={local_world} contradict each other; "
            "start the program with deepspeed or torchrun, or unset RANK to run one process"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise UsageError(f"RANK is set but {name} is not; start with deepspeed or torchrun, or set {name}")
    return RankInfo(rank, local_rank, world, local_world)


def _whole_number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise UsageError(
            f"{name}={environ.get(name, '')!r} is not a whole number, although RANK is set; "
            "start the program with deepspeed or torchrun"
        ) from None


@dataclass(frozen=True)
class Runtime:
    """A live process group. ``stop_runtime`` ends it."""

    info: RankInfo
    device: torch.device
    backend: str

    def barrier(self) -> None:
        """Collective: every rank must call."""
        if self.info.world > 1:
            torch.distributed.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank, through JSON (tuples come back as lists). Collective: every rank must call.

        JSON and not torch's object collectives: those pickle.
        """
        text = json.dumps(value).encode() if self.info.is_main else b""
        if self.info.world == 1:
            return json.loads(text)
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(size, src=0)
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.info.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        torch.distributed.broadcast(data, src=0)
        return json.loads(data.cpu().numpy().tobytes())

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value`` on every rank, in rank order, through JSON. Collective: every rank must call."""
        if self.info.world == 1:
            return [json.loads(json.dumps(value))]
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.info.world)]
        torch.distributed.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=self.device))
        lengths = [int(size.item()) for size in sizes]
        padded = torch.frombuffer(bytearray(text.ljust(max(lengths))), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded)
        return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in zip(parts, lengths, strict=True)]


def start_runtime(info: RankInfo, timeout_seconds: float = 1800.0) -> Runtime:
    """Join the process group. Collective: every rank must call.

    ``timeout_seconds`` is how long a collective may wait for the slowest rank; saving a large model needs minutes.
    """
    _complete_environment(info)
    import deepspeed  # after the environment: it picks its accelerator and counts devices from there
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed calls names that torch renamed in 2.13; neither the user nor we can act on that.
    renamed = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if info.is_main else logging.ERROR)
    on_cpu = accelerator_is_cpu()
    if on_cpu:
        os.environ["LOCAL_SIZE"] = str(info.local_world)  # the CPU accelerator's device count
        # Who says OMP_NUM_THREADS shares the cores with others that we do not know of.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // info.local_world))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        get_accelerator().set_device(info.local_rank)
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UsageError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is taken, perhaps by another job on this machine; "
            "give the launcher another: deepspeed --master_port 29501 ..."
        ) from None
    device = torch.device("cpu") if on_cpu else torch.device(get_accelerator().device_name(info.local_rank))
    return Runtime(info, device, backend)


def _complete_environment(info: RankInfo) -> None:
    """Give DeepSpeed the variables it insists on where no launcher did."""
    if info.world == 1:
        # Nobody else has to find this one, and a launcher's default port may be another job's on this machine.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.world))
    if info.local_world < info.world and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        # The step flags are gloo's on any accelerator: it must find the other machines as MASTER_ADDR is found.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_file(path: Path, timeout_seconds: float, otherwise: str) -> None:
    """Until ``path`` is there, made by another rank: for what is shared before there is a process group."""
    deadline = time.monotonic() + timeout_seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UsageError(f"{otherwise} within {timeout_seconds:.0f} s; see rank 0's output")
        time.sleep(0.2)


def stop_runtime() -> None:
    """Leave the process group. Every rank should, and only after its last collective."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def accelerator_is_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def wait_for_device() -> None:
    """Until everything queued on this rank's accelerator is done: for measuring, never in a step."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def accelerator_name(device: torch.device) -> str | None:
    """The driver's name of a GPU; None of a CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def allocated_memory_bytes() -> int:
    """Bytes of tensors on this rank's accelerator; on a CPU, the resident set of the process."""
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().memory_allocated())


def peak_memory_bytes() -> int:
    """The most this rank ever held: accelerator tensors, or on a CPU the peak resident set."""
    if accelerator_is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().max_memory_allocated())


def memory_report() -> str:
    """What this rank's accelerator has in use, a figure per line; on a CPU, the peak of the process."""
    if accelerator_is_cpu():
        return f"peak resident set: {peak_memory_bytes()} bytes\n"
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    lines = [f"{name}: {value}" for name, value in sorted(accelerator.memory_stats().items())]
    return "\n".join([f"device memory: {accelerator.total_memory()} bytes", *lines, ""])
