"""Word of a rank that ended, at once and on every rank: whatever the backend waits for, and however it ended.

Each rank holds a connection to rank 0, on which nothing is said until somebody fails. A rank that fails says why; of
one that was killed, its kernel closes the connection. The first such word is passed on to all, and is the cause: what
follows (collectives that broke, a launcher's signals) are its consequences. A machine that vanishes without a word is
not noticed here, but by time-outs.

A thread listens. It holds no collective: the main one may be waiting in one that will never end.
"""

import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import UsageError

KILLED = "ended without a word: killed, or out of host memory? Its node's and scheduler's log may know"
CONNECT_SECONDS = 60.0


class Lost(NamedTuple):
    """The rank that failed first, and why."""

    rank: int
    why: str
    code: int = 1  # what it exits with, and so do all


class Lifeline:
    """Collective: every rank must build it, and ``leave`` it where the run ended well.

    ``on_lost`` is called in a thread, once, on every rank but the lost one.
    """

    def __init__(self, runtime: Runtime, on_lost: Callable[[Lost], None]):
        self._runtime, self._on_lost = runtime, on_lost
        self._rank = runtime.info.rank
        self._lost: Lost | None = None
        self._known = threading.Event()
        self._leaving = False
        self._line: socket.socket | None = None
        if runtime.info.world > 1:
            self._join()

    def fail(self, why: str, code: int, wait_seconds: float) -> Lost:
        """Say that this rank fails. Returns who was first to: this one, as a rule."""
        if self._line is not None:
            _send(self._line, {"why": why, "code": code})
        return self.await_lost(wait_seconds) or Lost(self._rank, why, code)

    def await_lost(self, wait_seconds: float) -> Lost | None:
        """Who was lost; None where nothing is heard of anyone in that time."""
        self._known.wait(wait_seconds if self._line is not None else 0.0)
        return self._lost

    def leave(self) -> None:
        """From here on, ranks that end are no news. Collective: every rank must call."""
        self._leaving = True
        self._runtime.barrier()
        if self._line is not None:
            _send(self._line, {"bye": True})

    def _join(self) -> None:
        meeting = None
        if self._runtime.info.is_main:
            server = _listen_as(os.environ["MASTER_ADDR"], self._runtime.info.world)
            meeting = [server.getsockname()[1], secrets.token_hex(16)]
            exchange = _Exchange(server, meeting[1], self._runtime.info.world)
            threading.Thread(target=exchange.run, name="lifeline-exchange", daemon=True).start()
        port, token = self._runtime.broadcast_object(meeting)
        self._line = _connect(os.environ["MASTER_ADDR"], port)
        self._line.settimeout(None)
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _send(self._line, {"token": token, "rank": self._rank})
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def _listen(self) -> None:
        line = _read_line(self._line)
        if line is None and self._leaving:
            return
        self._lost = Lost(0, KILLED) if line is None else Lost(**line)
        self._known.set()
        if self._lost.rank != self._rank:
            self._on_lost(self._lost)


class _Exchange:
    """Rank 0's side: every rank's connection, its own too, and the first bad word on any."""

    def __init__(self, server: socket.socket, token: str, world: int):
        self._server, self._token, self._num_missing = server, token, world
        self._lines: dict[socket.socket, int] = {}  # connection -> rank

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while self._lines or self._num_missing:
                for key, _ in selector.select():
                    if key.fileobj is self._server:
                        self._welcome(selector)
                    elif lost := self._hear(key.fileobj, selector):
                        self._pass_on(lost)
                        return

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        if line := self._accept():
            selector.register(line, selectors.EVENT_READ)

    def _accept(self) -> socket.socket | None:
        line, _ = self._server.accept()
        line.settimeout(CONNECT_SECONDS)
        hello = _read_line(line)
        if hello is None or hello.get("token") != self._token:  # a stranger: ports get scanned
            line.close()
            return None
        self._lines[line] = hello["rank"]
        self._num_missing -= 1
        return line

    def _hear(self, line: socket.socket, selector: selectors.BaseSelector) -> Lost | None:
        word = _read_line(line)
        if word is not None and "bye" in word:
            selector.unregister(line)
            del self._lines[line]
            line.close()
            return None
        rank = self._lines[line]
        return Lost(rank, KILLED) if word is None else Lost(rank, word["why"], word["code"])

    def _pass_on(self, lost: Lost) -> None:
        for line in self._lines:
            _send(line, lost._asdict())
        while self._num_missing:  # ranks that this thread has not got round to yet
            if line := self._accept():
                _send(line, lost._asdict())


def _listen_as(address: str, backlog: int) -> socket.socket:
    """On a free port; for both families where ``address`` has the newer one, as another node may know the older."""
    newer = socket.getaddrinfo(address, None)[0][0] == socket.AF_INET6
    family = socket.AF_INET6 if newer else socket.AF_INET
    both = newer and socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def _connect(address: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR {address} cannot be reached at port {port} ({error}); ranks must be able to connect to each "
            "other at any port"
        ) from None


def _send(line: socket.socket, word: dict) -> None:
    try:
        line.sendall(json.dumps(word).encode() + b"\n")
    except OSError:  # the other end is gone: it will hear nothing more, and its own line says so
        return


def _read_line(line: socket.socket) -> dict | None:
    """One word, and nothing of what follows it; None where the other end is gone, or is no rank of ours."""
    received = b""
    try:
        while not received.endswith(b"\n"):
            waiting = line.recv(4096, socket.MSG_PEEK)
            if not waiting:
                return None
            received += line.recv(waiting.find(b"\n") + 1 or len(waiting))
        word = json.loads(received)
    except (OSError, ValueError):
        return None
    return word if isinstance(word, dict) else None
