"""What one machine is and has, as a line of JSON: ``python -m recap_ds.doctor.node [PATH ...]``.

The doctor runs this here and, over ssh, on every machine of a hostfile, and compares. It judges nothing itself.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

MARK = "RECAP_DS_NODE "
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
NO_LIMIT = -1
# Only what tells which network and device NCCL takes; other variables may hold secrets.
REPORTED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_")


class NodeFacts(NamedTuple):
    hostname: str
    python: str
    versions: dict[str, str | None]  # of what recap_ds requires; None = not installed
    requirements: dict[str, str]  # the ranges it is required in
    source: str  # a hash of recap_ds's own files
    time: float  # seconds since the epoch
    cpus: int  # that this process may use
    shared_memory_bytes: int  # free in /dev/shm; 0 = there is none
    limits: dict[str, int]  # soft limits: open_files, processes, locked_bytes; -1 = none
    infiniband: list[str]
    programs: dict[str, bool]  # True = on the PATH
    variables: dict[str, str]
    accelerator: dict[str, Any]  # AcceleratorFacts
    free_port: int
    paths: dict[str, bool]  # of those asked for: True = there

    @classmethod
    def from_output(cls, text: str) -> "NodeFacts":
        """What ``to_line`` gave, wherever it stands: login shells greet. ValueError where it is not there."""
        lines = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
        if len(lines) != 1:
            raise ValueError(f"it said: {' '.join(text.split())[-200:] or 'nothing'}")
        values = json.loads(lines[0])
        if set(values) != set(cls._fields):
            raise ValueError("its recap_ds is of another version")
        return cls(**values)

    def to_line(self) -> str:
        return MARK + json.dumps(self._asdict())


def examine_node(paths: list[str]) -> NodeFacts:
    from recap_ds.distributed.hardware import accelerator_facts  # with torch and DeepSpeed: seconds

    ranges = _requirements()
    limits = {
        "open_files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
        "locked_bytes": resource.RLIMIT_MEMLOCK,
    }
    return NodeFacts(
        hostname=socket.gethostname(),
        python=platform.python_version(),
        versions={name: _version(name) for name in ranges},
        requirements=ranges,
        source=_source_hash(),
        time=time.time(),
        cpus=len(os.sched_getaffinity(0)),
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        limits={name: _soft_limit(kind) for name, kind in limits.items()},
        infiniband=sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else [],
        programs={name: shutil.which(name) is not None for name in ("deepspeed", "pdsh", "ssh")},
        variables={key: value for key, value in sorted(os.environ.items()) if key.startswith(REPORTED_VARIABLES)},
        accelerator=accelerator_facts()._asdict(),
        free_port=_free_port(),
        paths={path: Path(path).exists() for path in paths},
    )


def _requirements() -> dict[str, str]:
    """Package -> range, of the plain install without extras."""
    try:
        parsed = [Requirement(text) for text in requires("recap_ds") or []]
    except PackageNotFoundError:  # run from the source folder, without an install
        return {}
    return {need.name: str(need.specifier) for need in parsed if need.marker is None or need.marker.evaluate()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source_hash() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _soft_limit(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    print(examine_node(sys.argv[1:]).to_line())
