"""Bandwidth between ranks: those of this machine, or of all machines of a hostfile through DeepSpeed's launcher."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from recap_ds.doctor.bandwidth import LIMIT_SECONDS, MARK, Bandwidth
from recap_ds.doctor.node import NodeFacts
from recap_ds.doctor.page import Finding, fail, ok, warn

WORKER = "recap_ds.doctor.bandwidth"
CPU_MEGABYTES, DEVICE_MEGABYTES = 32.0, 512.0
# Far below what the hardware does, far above what it does when it fell back to something else.
SLOW_WITHIN_NODE = 20.0  # GB/s: accelerators of one node, without NVLink or peer access
SLOW_OVER_NODES = 5.0  # GB/s: sockets over Ethernet instead of InfiniBand or RoCE
START_SECONDS = 60  # imports, before a rank counts its own limit
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def local_bandwidth_findings(facts: NodeFacts) -> list[Finding]:
    on_cpu = facts.accelerator["device"] == "cpu"
    ranks = 2 if on_cpu else facts.accelerator["count"]
    if ranks < 2:
        return [ok("local ranks", "one accelerator: nothing to measure")]
    processes = []
    for rank in range(ranks):
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": facts.free_port, "LOCAL_SIZE": ranks}
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, **meeting}
        environment = _clean_environment() | {key: str(value) for key, value in names.items()}
        processes.append(_start(_worker([sys.executable, "-m"], on_cpu), environment))
    outputs = _outputs(processes)
    return _judge("local ranks", outputs, 0.0 if on_cpu else SLOW_WITHIN_NODE, "is peer access or NVLink off?")


def nodes_bandwidth_findings(hostfile: str, first: NodeFacts, num_nodes: int) -> list[Finding]:
    """``first``: facts of the first machine of the hostfile, where rank 0 runs."""
    on_cpu = first.accelerator["device"] == "cpu"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--force_multi"]
    launcher += ["--launcher", "pdsh", "--master_port", str(first.free_port), "--module"]
    alive = "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    environment = _clean_environment()
    environment["PDSH_SSH_ARGS_APPEND"] = f"{alive} {environment.get('PDSH_SSH_ARGS_APPEND', '')}"
    outputs = _outputs([_start(_worker(launcher, on_cpu), environment)])
    mend = "is InfiniBand used? NCCL_DEBUG=INFO tells; NCCL_IB_HCA and NCCL_SOCKET_IFNAME belong into .deepspeed_env"
    return _judge(f"{num_nodes} nodes", outputs, 0.0 if on_cpu else SLOW_OVER_NODES, mend)


def _worker(start: Sequence[str], on_cpu: bool) -> list[str]:
    return [*start, WORKER, "--megabytes", str(CPU_MEGABYTES if on_cpu else DEVICE_MEGABYTES)]


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    # A group of its own: what a launcher started goes with it.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _outputs(processes: Sequence[subprocess.Popen]) -> list[str]:
    """What each said; all are gone when this returns."""
    outputs = []
    try:
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=LIMIT_SECONDS + START_SECONDS)[0])
            except subprocess.TimeoutExpired:
                outputs.append(f"no end within {LIMIT_SECONDS + START_SECONDS} s")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    return outputs


def _judge(subject: str, outputs: Sequence[str], slow: float, mend: str) -> list[Finding]:
    lines = "\n".join(outputs).splitlines()
    results = [line.split(MARK, 1)[1] for line in lines if MARK in line]  # pdsh writes the host's name before it
    if not results:
        said = next(
            (line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else ""
        )
        advice = "ranks must reach each other's ports: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and the firewall"
        return [fail(subject, f"the ranks did not get through an all-reduce: {said[-200:]}", advice)]
    result = Bandwidth(**json.loads(results[0]))
    what = (
        f"{result.ranks} ranks, {result.megabytes:.0f} MB: all-reduce {result.all_reduce_gb_per_second:.2f} GB/s, "
        f"all-gather {result.all_gather_gb_per_second:.2f} GB/s (bus bandwidth)"
    )
    if not result.correct:
        return [fail(subject, f"{what}, and the numbers are WRONG", "do not train on these machines: look at dmesg")]
    if min(result.all_reduce_gb_per_second, result.all_gather_gb_per_second) < slow:
        return [warn(subject, f"{what}; {slow:.0f} would be little", mend)]
    return [ok(subject, what)]
