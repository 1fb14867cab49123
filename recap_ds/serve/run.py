"""From an export to a running server: in this process until a signal, or in a thread of it."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recap_ds.errors import UsageError, leave
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.robot import RobotPolicy
from recap_ds.serve.server import PolicyServer, ServerSettings, Tally

START_SECONDS = 60.0


def serve_export(export: Path, settings: ServerSettings, device: str | None, say: Callable[[str], None]) -> Tally:
    """Serve until SIGTERM or Ctrl-C; a second one ends the process at once.

    ``device`` None: the accelerator, where there is one.
    """
    chosen = choose_device(device)
    robot = RobotPolicy.from_pretrained(export, chosen)
    record = ExportRecord.load(export)
    server = PolicyServer(robot, metadata_of(robot, record), settings)

    def on_ready(port: int) -> None:
        precision = str(robot.dtype).removeprefix("torch.")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"serving {export} in {precision} on {chosen}: ws://{host}:{port}")

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if stop.is_set():
                leave(128 + number)
            stop.set()
            say("stopping: requests that were made are answered first")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await server.run(stop, on_ready)

    asyncio.run(main())
    return server.tally


@contextmanager
def serving(robot: RobotPolicy, metadata: dict[str, Any], settings: ServerSettings) -> Iterator[int]:
    """A server in a thread, for as long as the context; gives its port."""
    server = PolicyServer(robot, metadata, settings)
    ready = threading.Event()
    shared: dict[str, Any] = {}

    async def main() -> None:
        shared["stop"], shared["loop"] = asyncio.Event(), asyncio.get_running_loop()

        def on_ready(port: int) -> None:
            shared["port"] = port
            ready.set()

        await server.run(shared["stop"], on_ready)

    def run() -> None:
        try:
            asyncio.run(main())
        except Exception as error:  # raised again in the thread that waits
            shared["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="policy server", daemon=True)
    thread.start()
    assert ready.wait(START_SECONDS), "the server did not start"
    try:
        if "error" not in shared:
            yield shared["port"]
    finally:
        if "port" in shared and thread.is_alive():
            shared["loop"].call_soon_threadsafe(shared["stop"].set)
        thread.join()
    if "error" in shared:
        raise shared["error"]


def choose_device(name: str | None) -> torch.device:
    """UsageError where this machine does not have it."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def metadata_of(robot: RobotPolicy, record: ExportRecord) -> dict[str, Any]:
    """What a client is told: how to ask, and who answers."""
    contract = robot.contract
    return {
        "cameras": list(contract.cameras),
        "image_size": [contract.image_size, contract.image_size],
        "state_dim": contract.state_dim,
        "action_dim": contract.action_dim,
        "chunk_size": robot.chunk_size,
        "fps": contract.fps,
        "example_prompt": next(iter(contract.tasks.values())).prompt if contract.tasks else "",
        "export": {
            "content_sha256": record.content_hash(),
            "config_sha256": record.config_sha256,
            "data_manifest": record.manifest_hash,
            "recap_ds": record.recap_ds_version,
            **record.provenance.model_dump(),
        },
    }
