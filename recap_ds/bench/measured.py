"""Time and peak memory of a function, in a process of its own.

Peak is VmHWM of /proc/self/status: all resident memory of the child, the interpreter, its libraries and mapped pages of
files included. (``ru_maxrss`` would begin at the parent's: a fork inherits it.) The same function is called first on
something small, so that neither the time nor ``above_small`` counts imports.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.errors import RunFailed

Arguments = Mapping[str, Any]  # JSON


class Measured(NamedTuple):
    seconds: float
    peak_mib: float
    peak_above_small_mib: float  # beyond what the same function needed for the small thing


def measure(function: Callable[..., Any], small: Arguments, large: Arguments) -> Measured:
    """Call ``function`` (of a module, by its name) with ``small`` and then ``large``, alone in a new process."""
    arguments = [f"{function.__module__}:{function.__name__}", json.dumps(small), json.dumps(large)]
    command = [sys.executable, "-m", "recap_ds.bench.measured", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunFailed(f"bench: {arguments[0]} failed: {last}")
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _child(name: str, small: str, large: str) -> None:
    module, function_name = name.split(":")
    function = vars(import_module(module))[function_name]
    function(**json.loads(small))
    before = _peak_mib()
    begin = time.perf_counter()
    function(**json.loads(large))
    seconds = time.perf_counter() - begin
    peak = _peak_mib()
    print(f"\n{json.dumps([seconds, peak, peak - before])}")


if __name__ == "__main__":
    _child(*sys.argv[1:])
