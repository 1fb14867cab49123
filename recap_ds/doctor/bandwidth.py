"""One rank of the bandwidth test: ``python -m recap_ds.doctor.bandwidth --megabytes M`` under any launcher.

ZeRO-3 gathers weights (all-gather) and reduces gradients; these are the two sizes of message it lives by. Rank 0
prints one line, ``MARK`` and JSON. Figures are bus bandwidths, comparable over numbers of ranks: for a message of
S bytes in t seconds over n ranks, all-reduce 2 (n-1)/n S/t, and all-gather (n-1)/n S/t with S the gathered whole.
"""

import argparse
import faulthandler
import json
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from recap_ds.distributed.runtime import Runtime, read_rank_info, start_runtime, stop_runtime

MARK = "RECAP_DS_BANDWIDTH "
WARM_UP = 2
REPEATS = 8
# A rank that hears nothing of its peers for so long ends by itself, on whichever machine it is.
LIMIT_SECONDS = 150


class Bandwidth(NamedTuple):
    ranks: int
    megabytes: float
    all_reduce_gb_per_second: float
    all_gather_gb_per_second: float
    correct: bool  # False = a collective returned wrong numbers on some rank


def measure(runtime: Runtime, megabytes: float) -> Bandwidth:
    """Collective: every rank must call."""
    world, rank = runtime.info.world, runtime.info.rank
    part_numel = max(1, int(megabytes * 1e6 / 4 / world))
    part = torch.full((part_numel,), float(rank + 1), device=runtime.device)
    whole = torch.empty(part_numel * world, device=runtime.device)
    num_bytes = whole.numel() * whole.element_size()

    gather_seconds = _time(lambda: torch.distributed.all_gather_into_tensor(whole, part), whole, runtime)
    ranks = torch.arange(1, world + 1, device=runtime.device, dtype=whole.dtype)
    correct = bool((whole.view(world, -1) == ranks[:, None]).all())
    reduce_seconds = _time(lambda: torch.distributed.all_reduce(whole), whole, runtime)
    whole.fill_(float(rank + 1))
    torch.distributed.all_reduce(whole)
    correct &= bool((whole == world * (world + 1) / 2).all())
    wrong = torch.tensor([float(not correct)], device=runtime.device)
    torch.distributed.all_reduce(wrong)
    shares = (world - 1) / world * num_bytes / 1e9
    return Bandwidth(world, num_bytes / 1e6, 2 * shares / reduce_seconds, shares / gather_seconds, wrong.item() == 0)


def _time(collective: Callable[[], object], result: Tensor, runtime: Runtime) -> float:
    """Median seconds of one call. Reading a number of the result waits for the device."""
    seconds = []
    for repeat in range(WARM_UP + REPEATS):
        runtime.barrier()
        start = time.perf_counter()
        collective()
        result[0].item()
        if repeat >= WARM_UP:
            seconds.append(time.perf_counter() - start)
        result.zero_()  # sums of sums would overflow
    collective()
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    megabytes = parser.parse_args().megabytes
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    runtime = start_runtime(read_rank_info(), timeout_seconds=LIMIT_SECONDS)
    result = measure(runtime, megabytes)
    if runtime.info.is_main:
        print(MARK + json.dumps(result._asdict()), flush=True)
    stop_runtime()


if __name__ == "__main__":
    main()
