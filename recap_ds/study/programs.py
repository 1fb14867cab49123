"""Programs as processes of their own, several at a time, each with its words in a file; and how all of them stop.

One program is one process here: a study's jobs are small, and two side by side use two cores better than one on both.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from recap_ds.errors import EXIT_STOPPED, RunFailed, RunStopped, UsageError

SCRIPTS = ("train.py", "label.py", "evaluate.py")
LAST_WORDS = 300


class Crew:
    """Starts programs for several threads. ``scripts``: the folder of the launch scripts."""

    def __init__(self, scripts: Path, num_jobs: int) -> None:
        for name in SCRIPTS:
            if not (scripts / name).is_file():
                raise UsageError(f"--programs {scripts}: has no {name}; name the launch/ folder of the repository")
        self._scripts = scripts
        self._num_jobs = num_jobs
        self._lock = threading.RLock()  # a signal handler takes it in a thread that may hold it
        self._running: set[subprocess.Popen] = set()
        self._told: set[subprocess.Popen] = set()  # to save and end
        self._stopping = False

    def script(self, what: str, log: Path, name: str, *arguments: str, alone: bool = False) -> float:
        """One of the launch scripts to its end; the seconds it took. RunFailed or RunStopped where it does not.

        ``alone``: nothing runs beside it, so it may take all cores.
        """
        return self._run(what, log, [sys.executable, str(self._scripts / name), *arguments], alone)

    def verb(self, what: str, log: Path, *arguments: str) -> float:
        """One verb of recap-ds."""
        return self._run(what, log, [sys.executable, "-m", "recap_ds.cli.main", *arguments], alone=False)

    def stop(self) -> None:
        """Start nothing more, and ask all that runs to save and end; where a signal said so before, that stands."""
        with self._lock:
            if not self._stopping:
                self._tell()
            self._stopping = True

    def stop_at_signal(self, tell: bool = True) -> None:
        """As ``stop``. ``tell`` False: what runs has probably heard it too; if not, a signal that tells comes later."""
        with self._lock:
            if not self._stopping:
                how = "" if tell else f"; if it does not hear of it: kill {os.getpid()}"
                with suppress(OSError):  # not print: this thread may be in the middle of one
                    os.write(1, f"stopping: what runs saves first{how}\n".encode())
            if tell:
                self._tell()
            self._stopping = True

    def _tell(self) -> None:
        """Once: a second time would mean at once."""
        for process in self._running - self._told:
            process.send_signal(signal.SIGTERM)
            self._told.add(process)

    def _run(self, what: str, log: Path, command: Sequence[str], alone: bool) -> float:
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // (1 if alone else self._num_jobs))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        began = time.monotonic()
        with log.open("ab") as words:
            words.write(f"$ {shlex.join(command)}\n".encode())
            words.flush()
            with self._lock:
                if self._stopping:
                    raise RunStopped(what)
                process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
                if self._stopping:  # a signal came in these three lines
                    process.send_signal(signal.SIGTERM)
                    self._told.add(process)
            print(f"{what}: begins", flush=True)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
            stopping = self._stopping
        if code == EXIT_STOPPED or (stopping and code != 0):
            raise RunStopped(what)
        if code != 0:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = f"{what} {how}: {_last_line(log)}"
            raise RunFailed(f"{why} (all of it in {log}); the same command goes on from there")
        seconds = time.monotonic() - began
        print(f"{what}: done in {seconds:.0f} s", flush=True)
        return seconds


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line]
    return told[-1].removeprefix("error: ")[:LAST_WORDS]
