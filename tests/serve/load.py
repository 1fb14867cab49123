"""Good and hostile clients together against a server of their own on loopback: ``python -m tests.serve.load``.

Two thirds ask in turn for actions that are known beforehand and compare what they get; one third does what clients
must not do, a kind each. Prints one JSON line; exit code 1 where an answer was wrong or missing, or the server died.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from recap_ds.serve.codec import ARRAY, pack, unpack
from tests.serve.made import API_KEY, TOLERANCE, load_made, request, right_answer, save_made

HOST = "127.0.0.1"
NUM_REQUESTS = 40
MAX_MESSAGE_BYTES = 500_000
OBJECT_ARRAY = {ARRAY: True, b"data": b"\x80\x04N.", b"dtype": "|O", b"shape": [1]}
WRONG = (
    {"observation/front": np.zeros((24, 32), np.uint8)},
    {"observation/front": np.zeros((24, 32, 3), np.float64)},
    {"observation/front": OBJECT_ARRAY},
    {"observation/state": np.zeros(5, np.float32)},
    {"observation/state": np.full(3, np.nan, np.float32)},
    {"observation/state": np.full(3, 1e38, np.float32)},
    {"observation/state": OBJECT_ARRAY},
    {"prompt": "much " * 1000},
    {"seed": "seed"},
    {"unknown": [[[[]]]] * 50},
)


class Load:
    """One run: where the server is, what is right, and what has happened."""

    def __init__(self, port: int, answers: list[np.ndarray], seconds: float):
        self._port, self._answers = port, answers
        self._end = time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.worst = 0.0

    async def run(self, num_clients: int) -> None:
        bad = [self._wrong, self._garbage, self._oversized, self._leaving, self._half_open, self._wrong_key]
        clients = [bad[number // 3 % len(bad)] if number % 3 == 2 else self._good for number in range(num_clients)]
        await asyncio.gather(*(self._client(kind, number) for number, kind in enumerate(clients)))

    async def _client(self, kind: Callable[[random.Random], Awaitable[None]], number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self._end:
            try:
                await asyncio.wait_for(kind(chance), 60)
            except Exception as error:
                self.problems.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                return

    def _open(self) -> connect:
        headers = {"Authorization": f"Api-Key {API_KEY}"}
        where = f"ws://{HOST}:{self._port}"
        return connect(where, additional_headers=headers, proxy=None, compression=None, open_timeout=30)

    async def _good(self, chance: random.Random) -> None:
        """Stays connected for some requests."""
        async with self._open() as connection:
            await connection.recv()
            for _ in range(50):
                if time.monotonic() < self._end:
                    await self._ask(connection, chance.randrange(NUM_REQUESTS))

    async def _ask(self, connection: ClientConnection, number: int) -> None:
        await connection.send(pack(request(number)))
        reply = await connection.recv()
        if isinstance(reply, str):
            self.problems.append(f"request {number} was refused: {reply}")
            return
        actions = unpack(reply)["actions"]
        self.seen["answers"] += 1
        self.worst = max(self.worst, float(np.abs(actions - self._answers[number]).max()))
        if not np.allclose(actions, self._answers[number], **TOLERANCE):
            self.problems.append(f"request {number} got the wrong actions")

    async def _told(self, message: Any) -> None:
        """A message that must be answered by a text, on a connection that goes on."""
        async with self._open() as connection:
            await connection.recv()
            await connection.send(message)
            reply = await connection.recv()
            if not isinstance(reply, str):
                self.problems.append(f"{message[:60]!r} was answered")
            self.seen["refusals"] += 1
            await self._ask(connection, 0)

    async def _wrong(self, chance: random.Random) -> None:
        await self._told(pack(request(1, **chance.choice(WRONG))))

    async def _garbage(self, chance: random.Random) -> None:
        await self._told(b"\xc1" + chance.randbytes(chance.randrange(5000)))

    async def _oversized(self, chance: random.Random) -> None:
        async with self._open() as connection:
            await connection.recv()
            try:
                await connection.send(bytes(MAX_MESSAGE_BYTES + chance.randrange(1, MAX_MESSAGE_BYTES)))
                await connection.recv()
                self.problems.append("an oversized message was answered")
            except ConnectionClosed:
                self.seen["oversized"] += 1

    async def _leaving(self, chance: random.Random) -> None:
        async with self._open() as connection:
            await connection.recv()
            await connection.send(pack(request(chance.randrange(NUM_REQUESTS))))
            connection.transport.abort()
        self.seen["left"] += 1

    async def _half_open(self, chance: random.Random) -> None:
        """A socket that says nothing, half a handshake or half a frame, for a while."""
        _, writer = await asyncio.open_connection(HOST, self._port)
        handshake = (
            "GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            f"Authorization: Api-Key {API_KEY}\r\n\r\n"
        ).encode()
        writer.write(chance.choice([b"", handshake[:40], handshake, handshake + b"\x82\xff\0\0", b"\x16\x03\x01" * 50]))
        await asyncio.sleep(chance.random())
        writer.transport.abort()
        self.seen["half open"] += 1

    async def _wrong_key(self, chance: random.Random) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: here\r\nAuthorization: Api-Key " + b"x" * chance.randrange(99) + b"\r\n\r\n"
        )
        if not (await reader.read()).startswith(b"HTTP/1.1 401 "):
            self.problems.append("a wrong key was not refused by 401")
        writer.transport.abort()
        self.seen["wrong keys"] += 1


async def watch(process: psutil.Process, until: asyncio.Event) -> list[float]:
    """Resident MiB of the server, every half second."""
    samples = []
    while not until.is_set():
        samples.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.5)
    return samples


async def run_clients(load: Load, server: psutil.Process, num_clients: int) -> list[float]:
    done = asyncio.Event()
    watching = asyncio.ensure_future(watch(server, done))
    await load.run(num_clients)
    done.set()
    return await watching


def run_load(seconds: float, num_clients: int) -> dict[str, Any]:
    """Figures as JSON. ``problems`` is empty where all went well."""
    with tempfile.TemporaryDirectory() as folder:
        export = save_made(Path(folder) / "export")
        robot = load_made(export)[0]
        answers = [right_answer(robot, request(number)) for number in range(NUM_REQUESTS)]
        flags = ["--api-key", API_KEY, "--max-clients", str(2 * num_clients), "--max-message", "500KB"]
        command = [sys.executable, "-m", "recap_ds.cli.main", "serve", str(export), "--port", "0", "--device", "cpu"]
        server = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            load = Load(int(server.stdout.readline().rsplit(":", 1)[1]), answers, seconds)
            memory = asyncio.run(run_clients(load, psutil.Process(server.pid), num_clients))
            server.send_signal(signal.SIGTERM)
            said, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    if server.returncode or errors:
        load.problems.append(f"the server ended with {server.returncode} and said {errors[-500:]!r}")
    # After the first fifth: until then buffers of every size are made.
    later = memory[len(memory) // 5 :]
    half = len(later) // 2
    return {
        "seconds": seconds,
        "clients": num_clients,
        **load.seen,
        "largest_difference": load.worst,
        "memory_mib": {
            "first_half": round(statistics.median(later[:half] or memory), 1),
            "second_half": round(statistics.median(later[half:]), 1),
            "peak": round(max(memory), 1),
        },
        "server": said.splitlines()[-1],
        "problems": load.problems[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Load one policy server on loopback, hostile clients among the good.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=50)
    args = parser.parse_args()
    figures = run_load(args.seconds, args.clients)
    print(json.dumps(figures))
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
