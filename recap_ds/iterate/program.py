"""One program in the foreground, which saves and ends when we are told to stop.

A launcher must not hear of it: ``deepspeed`` ends at once by a signal, or gives its ranks half a minute. So the ranks
are told themselves, and it ends after them.
"""

import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

# Ctrl-C reaches the whole process group: a program that heard it has this long to end by itself.
GRACE_SECONDS = 2.0
LOOK_SECONDS = 0.2


class Program:
    def __init__(self) -> None:
        self.is_stopping = False
        self._process: subprocess.Popen | None = None
        self._ranks: list[psutil.Process] = []
        self._later: threading.Timer | None = None

    def run(self, command: Sequence[str]) -> int:
        """Its exit code; it reads and writes our terminal. In the main thread, which alone hears signals."""
        ways = {signal.SIGTERM: lambda *_: self._stop(), signal.SIGINT: lambda *_: self._stop(GRACE_SECONDS)}
        # One that was ignored when we began (nohup) stays ignored.
        heard = [number for number in ways if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, ways[number]) for number in heard}
        try:
            self._process = subprocess.Popen(command)
            if self.is_stopping:  # since a moment ago
                self._tell()
            code = self._process.wait()
            while any(map(_lives, self._ranks)):  # their launcher may end before them
                time.sleep(LOOK_SECONDS)
            return code
        finally:
            if self._later is not None:
                self._later.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, grace_seconds: float = 0.0) -> None:
        self.is_stopping = True
        if self._process is not None:
            self._ranks = self._ranks or _ranks_below(self._process.pid)
        if not grace_seconds:
            self._tell()
        elif self._later is None:
            self._later = threading.Timer(grace_seconds, self._tell)
            self._later.daemon = True
            self._later.start()

    def _tell(self) -> None:
        if self._ranks:
            for rank in self._ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.terminate()
        elif self._process is not None:
            self._process.terminate()


def _ranks_below(pid: int) -> list[psutil.Process]:
    """What a launcher started as ranks; not their own children, which have the same environment."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks = {each.pid: each for each in below if _is_rank(each)}
    return [each for each in ranks.values() if _parent(each) not in ranks]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()
    except (psutil.Error, OSError):  # it has ended
        return False


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
