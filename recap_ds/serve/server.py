"""The policy server: websockets, in the protocol of ``openpi-client``.

A client connects and is sent the metadata; every message of its is answered in turn, by a map with ``actions`` and
``server_timing``, or by a text that says what was wrong with it, after which the connection goes on. Whoever has no key
is refused before a byte of payload is read. A client holds one message of bounded size, one place in the queue of the
model and nothing else, so what it does wrong is its own trouble: it times out where it stops answering pings.
"""

import asyncio
import hmac
import http
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.robot import ChunkRequest, RobotPolicy
from recap_ds.serve.batcher import Batcher
from recap_ds.serve.codec import pack, unpack
from recap_ds.serve.message import Question, read_question

GOING_AWAY = 1001
INTERNAL_ERROR = "the server failed on this request; its log says why"


class ServerSettings(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = None
    max_batch: int = 8
    max_clients: int = 64
    max_message_bytes: int = 32 * 10**6
    ping_seconds: float = 20.0  # between pings, and until a pong
    handshake_seconds: float = 10.0
    # After a signal: how long requests that are being answered may take.
    drain_seconds: float = 30.0


class Tally:
    """What a server has done, for its last line."""

    def __init__(self) -> None:
        self.answered = self.refused_requests = self.clients = self.refused_clients = 0

    def __str__(self) -> str:
        return (
            f"{self.answered} requests of {self.clients} clients answered; "
            f"{self.refused_requests} requests and {self.refused_clients} clients refused"
        )


class PolicyServer:
    """``metadata`` is what a client is told when it connects."""

    def __init__(self, robot: RobotPolicy, metadata: dict[str, Any], settings: ServerSettings):
        self._robot, self._settings = robot, settings
        self._metadata = pack(metadata)
        self._connected = 0
        self.tally = Tally()

    async def run(self, stop: asyncio.Event, on_ready: Callable[[int], None]) -> None:
        """Serve until ``stop``, then answer what was asked and leave. ``on_ready`` is told the port."""
        settings = self._settings
        self._stop = stop
        # One: tokenizers are not made for several threads.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        async with Batcher(self._robot.predict_chunks, settings.max_batch) as self._batcher:
            try:
                server = await serve(
                    self._talk,
                    settings.host,
                    settings.port,
                    # Browsers say where a page came from, robots do not: no web page may reach a local server.
                    origins=[None],
                    process_request=self._admit,
                    compression=None,
                    max_size=settings.max_message_bytes,
                    max_queue=1,
                    open_timeout=settings.handshake_seconds,
                    ping_interval=settings.ping_seconds,
                    ping_timeout=settings.ping_seconds,
                    close_timeout=min(settings.ping_seconds, 5.0),
                    logger=_logger(),
                )
            except OSError as error:
                where = f"{settings.host}:{settings.port}"
                raise RunFailed(f"{where}: cannot be listened on ({error.strerror or error})") from None
            on_ready(server.sockets[0].getsockname()[1])
            await stop.wait()
            # Nobody new; those who talk are let finish, by _talk.
            server.close(close_connections=False)
            try:
                await asyncio.wait_for(server.wait_closed(), settings.drain_seconds)
            except asyncio.TimeoutError:
                for connection in list(server.all_connections):
                    connection.transport.abort()
        self._reader.shutdown(wait=False)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the websocket opens: an HTTP answer, or None to go on."""
        if request.path.partition("?")[0] == "/healthz":
            if self._batcher.failing:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "the last request failed\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        key = self._settings.api_key
        if key is not None:
            given = ",".join(request.headers.get_all("Authorization")).encode(errors="surrogateescape")
            if not hmac.compare_digest(given, f"Api-Key {key}".encode()):
                self.tally.refused_clients += 1
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing API key\n")
        if self._connected >= self._settings.max_clients:
            self.tally.refused_clients += 1
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """The whole life of one client."""
        self._connected += 1
        self.tally.clients += 1
        chunk: deque[np.ndarray] = deque()
        stopped = asyncio.ensure_future(self._stop.wait())
        left = asyncio.ensure_future(connection.wait_closed())
        try:
            await connection.send(self._metadata)
            while not stopped.done():
                message = await _before(stopped, connection.recv())
                if message is None:
                    break
                reply = await _before(left, self._reply(message, chunk))
                if reply is None:
                    break
                await connection.send(reply)
            await connection.close(GOING_AWAY, "the server is stopping")
        except ConnectionClosed:
            pass  # however it ended, there is nobody to tell
        finally:
            stopped.cancel()
            left.cancel()
            self._connected -= 1

    async def _reply(self, message: str | bytes, chunk: deque[np.ndarray]) -> str | bytes:
        """``chunk`` holds what is left of the client's chunk, where it takes single actions."""
        begin = time.perf_counter()
        try:
            reply = await self._answer(message, chunk, begin)
        except UsageError as error:
            self.tally.refused_requests += 1
            return str(error)
        except Exception as error:  # a fault of ours must not end the server; it is printed, and the client is told
            traceback.print_exception(error)
            self.tally.refused_requests += 1
            return INTERNAL_ERROR
        self.tally.answered += 1
        return pack(reply)

    async def _answer(self, message: str | bytes, chunk: deque[np.ndarray], begin: float) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        question, request = await loop.run_in_executor(self._reader, partial(self._read, message, chunk))
        timing = {"prepare_ms": 1e3 * (time.perf_counter() - begin)}
        if request is not None:
            answer = await self._batcher.ask(request)
            if not np.isfinite(answer.actions).all():
                raise UsageError(
                    "observation/state or guidance_beta: is so far from what is usual that no action comes of it"
                )
            timing |= {
                "wait_ms": 1e3 * answer.wait_seconds,
                "infer_ms": 1e3 * answer.infer_seconds,
                "batch_size": answer.batch_size,
            }
            chunk.clear()
            chunk.extend(answer.actions)
        actions = [chunk.popleft()] if question.single_action else chunk
        reply = {"actions": np.stack(list(actions)), "server_timing": timing}
        if not question.single_action:
            chunk.clear()
        timing["total_ms"] = 1e3 * (time.perf_counter() - begin)
        return reply

    def _read(self, message: str | bytes, chunk: deque[np.ndarray]) -> tuple[Question, ChunkRequest | None]:
        """None where the client takes the next action of the chunk it has."""
        if isinstance(message, str):
            raise UsageError("message: expected msgpack in a binary frame, got a text frame")
        question = read_question(unpack(message), self._robot.contract)
        if question.single_action and chunk and not question.reset:
            return question, None
        options = {name: getattr(question, name) for name in ("advantage", "guidance_beta", "seed")}
        return question, self._robot.request(question.observation, **options)


async def _before(event: asyncio.Future[Any], work: Coroutine[Any, Any, str | bytes]) -> str | bytes | None:
    """What ``work`` gives; None where ``event`` came first, and then it is given up."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task, event], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    return None


def _logger() -> logging.Logger:
    """websockets' own words, without some for every client that arrives or leaves in disorder."""
    logger = logging.getLogger("recap_ds.serve")
    logger.setLevel(logging.ERROR)
    logger.addFilter(_is_about_us)
    return logger


def _is_about_us(record: logging.LogRecord) -> bool:
    # An error to websockets 15: what was sent was no handshake.
    return record.getMessage() != "opening handshake failed"
