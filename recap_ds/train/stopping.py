"""Who may ask a run to stop before its last step, on this rank: signals, a file, the clock, a launcher that died.

A request is only noted here. The loop posts it at every step (``distributed/flags.py``), and where all ranks have read
it they save, finish all writing and leave together with exit code 75. Until a run holds anything worth saving, a signal
ends the process at once.

A signal that comes again ends the process at once as well, by a thread: the main one may be deep in a collective.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.errors import EXIT_STOPPED

# SIGHUP: the terminal was closed. A signal that was ignored when we began (nohup) stays ignored.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# One request reaches a rank twice where its launcher passes on what the whole process group has got.
ECHO_SECONDS = 2.0
# How often a file, a clock or a process is looked at: a file may lie on a slow network file system.
POLL_SECONDS = 5.0

# Codes of ``StepFlags.stop``; signals follow as _SIGNAL_BASE + number, and what is largest is what is said.
NOTHING, WALL_TIME, STOP_FILE, LAUNCHER = range(4)
_SIGNAL_BASE = 16
_NAMES = {WALL_TIME: "training.max_wall_minutes", STOP_FILE: "the stop file", LAUNCHER: "its launcher has ended"}


def describe(code: int) -> str:
    """What a code of ``StepFlags.stop`` means, for people."""
    return _NAMES[code] if code in _NAMES else signal.Signals(code - _SIGNAL_BASE).name


class StopSignals:
    """Listens while it is entered. Only in the main thread of a program."""

    def __init__(self, echo_seconds: float = ECHO_SECONDS) -> None:
        self._echo_seconds = echo_seconds
        self._first: dict[int, float] = {}  # signal number -> when it first came
        self._previous: dict[int, Any] = {}  # signal number -> the handler it had
        self._defers = self._leaving = False

    def defer(self) -> None:
        """From here on the first signal waits for a step boundary."""
        self._defers = True

    def leave(self) -> None:
        """The stop is obeyed: what a launcher still sends must not spoil the exit code."""
        self._leaving = True
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    @property
    def code(self) -> int:
        """What ``StepFlags.stop`` should say: the first signal, others may be a launcher's echo; 0 while none came."""
        return _SIGNAL_BASE + next(iter(self._first)) if self._first else NOTHING

    def __enter__(self) -> "StopSignals":
        # Python runs its own handlers only between two steps of the main thread. The bytes of this pair come at once.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._leaving:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # the thread reads the end
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                if number in self._previous and not self._leaving:  # others write here too
                    self._note(number)

    def _note(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._defers:
            _leave_now(f"{name}: stopped before the run began", EXIT_STOPPED)
        if number not in self._first:
            if not self._first and os.environ.get("RANK", "0") == "0":
                print(f"{name}: saving after this step, then leaving; once more leaves at once", file=sys.stderr)
            self._first[number] = now
        elif now - self._first[number] > self._echo_seconds:
            _leave_now(f"{name} again: left at once; what was saved before is safe", 128 + number)


def _leave_now(text: str, code: int) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


class Process(NamedTuple):
    """A process that may end: its number can be used again, the time it began cannot."""

    pid: int
    began: str

    def lives(self) -> bool:
        return _stat(self.pid)[1:] == (self.began,)


def find_launchers() -> list[Process]:
    """The launchers above this process, nearest first: ``deepspeed`` is two of them, one inside the other.

    A shell or a scheduler above them may end while the run goes on; a launcher may not. Empty where there is no /proc.
    """
    found, pid = [], os.getppid()
    while pid > 1 and _is_launcher(pid):
        parent, *began = _stat(pid)
        if not began:
            break
        found.append(Process(pid, began[0]))
        pid = int(parent)
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    modules = ("deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run")
    # "python -u -m MODULE ..." or "python /path/bin/deepspeed ...".
    return "python" in words[0] and any(
        word in modules or Path(word).name in ("deepspeed", "torchrun") for word in words[1:4]
    )


def _stat(pid: int) -> tuple[str, ...]:
    """Parent and start time of a process that runs; empty of any other."""
    try:
        # The name, in parentheses, may hold spaces: fields are counted from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()
    return () if fields[0] in "ZX" else (fields[1], fields[19])


class StopRequests:
    """All that this rank knows of; ``poll`` is cheap enough for every step."""

    def __init__(
        self,
        signals: StopSignals | None = None,
        stop_file: Path | None = None,
        max_wall_minutes: float | None = None,
        launchers: list[Process] | None = None,
        began: float | None = None,
    ) -> None:
        """``began`` is when this process did, by ``time.monotonic``. A rank is told only what it should look at."""
        self._signals, self._stop_file, self._launchers = signals, stop_file, launchers or []
        began = time.monotonic() if began is None else began
        self._deadline = None if max_wall_minutes is None else began + 60.0 * max_wall_minutes
        self._next_look = 0.0
        self._seen = NOTHING

    def poll(self) -> int:
        """The code of the weightiest request so far, 0 where there is none. It never goes away again."""
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + POLL_SECONDS
            self._seen = max(self._seen, self._look(now))
        return max(self._seen, self._signals.code if self._signals else NOTHING)

    def leave(self) -> None:
        if self._signals is not None:
            self._signals.leave()

    def _look(self, now: float) -> int:
        if not all(launcher.lives() for launcher in self._launchers):
            return LAUNCHER
        if self._stop_file is not None and self._stop_file.is_file():
            return STOP_FILE
        return WALL_TIME if self._deadline is not None and now >= self._deadline else NOTHING
