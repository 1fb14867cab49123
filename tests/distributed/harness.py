"""Real processes for tests of collectives: one rank each, gloo on CPU, JSON results.

A worker is a module with ``if __name__ == "__main__": worker_main(scenarios)``. Starting a process group costs ten
seconds, so a worker packs many scenarios into one launch; a test then looks at the numbers.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recap_ds.doctor.network import LAUNCHER_VARIABLES

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT_VARIABLE = "RECAP_DS_TEST_RESULT"
TIMEOUT_VARIABLE = "RECAP_DS_TEST_TIMEOUT_SECONDS"


def run_ranks(worker: str, world: int, *args: str, timeout_seconds: float = 240.0) -> list[dict[str, Any]]:
    """Run ``python -m tests.<worker> *args`` on ``world`` ranks; every rank's result, in rank order.

    A ``worker`` without a dot is one of ``tests.distributed``.

    A single rank is started as plain ``python`` would be, without a launcher's variables. Fails with the output of
    every rank as soon as one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [_start_rank(worker, args, rank, world, Path(folder), port, timeout_seconds) for rank in range(world)]
        _wait(ranks, time.monotonic() + timeout_seconds)
        if any(process.returncode for process in ranks):
            outputs = (f"--- rank {r}\n{(Path(folder) / f'{r}.log').read_text()[-8000:]}" for r in range(world))
            codes = [process.returncode for process in ranks]
            raise AssertionError("\n".join((f"{worker} on {world} ranks: exit codes {codes}", *outputs)))
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _start_rank(
    worker: str, args: tuple[str, ...], rank: int, world: int, folder: Path, port: int, timeout_seconds: float
) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
        environment |= {key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    environment |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": str(folder),  # no compiler: nothing may be built at start
        RESULT_VARIABLE: str(folder / f"{rank}.json"),
        # Before the parent gives up, so that its report holds every rank's stack.
        TIMEOUT_VARIABLE: str(max(1.0, timeout_seconds - 10.0)),
    }
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"tests.{worker}" if "." in worker else f"tests.distributed.{worker}", *args],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(ranks: list[subprocess.Popen], deadline: float) -> None:
    """Until all end; where one fails or time is up, the others would wait for ever and are killed."""
    try:
        while any(process.poll() is None for process in ranks):
            if any(process.returncode for process in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def worker_main(scenarios: Callable[..., dict[str, Any]]) -> None:
    """In the worker: join the group, run ``scenarios(runtime, *argv)``, report what it returns."""
    faulthandler.dump_traceback_later(float(os.environ[TIMEOUT_VARIABLE]), exit=True)
    from recap_ds.distributed.runtime import read_rank_info, start_runtime, stop_runtime

    runtime = start_runtime(read_rank_info(), timeout_seconds=120)
    result = scenarios(runtime, *sys.argv[1:])
    runtime.barrier()
    stop_runtime()
    Path(os.environ[RESULT_VARIABLE]).write_text(json.dumps(result))
