"""A client for robots, in the same protocol as ``openpi-client`` (which wants an old numpy)."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from recap_ds.errors import RunFailed, UsageError
from recap_ds.serve.codec import pack, unpack


class PolicyClient:
    """``with PolicyClient("127.0.0.1", 8000) as policy: policy.infer({...})["actions"]``; of one thread."""

    def __init__(self, host: str, port: int, api_key: str | None = None, timeout_seconds: float = 60.0):
        self._timeout_seconds = timeout_seconds
        where = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        try:
            # A proxy of the environment is for the web, not for a robot's server.
            self._connection = connect(
                where,
                compression=None,
                max_size=None,
                additional_headers=headers,
                proxy=None,
                open_timeout=timeout_seconds,
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            raise RunFailed(f"{where}: no policy server answers ({error})") from None
        self.metadata: dict[str, Any] = unpack(self._receive())

    def infer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``actions`` [H, A] and ``server_timing``. UsageError, in the server's words, where it refuses the request."""
        reply = self._receive(pack(dict(request)))
        if isinstance(reply, str):
            raise UsageError(f"policy server: {reply}")
        return unpack(reply)

    def _receive(self, data: bytes | None = None) -> str | bytes:
        """The next message, where there is ``data`` the answer to it."""
        try:
            if data is not None:
                self._connection.send(data)
            return self._connection.recv(self._timeout_seconds)
        except BaseException as error:
            # An answer that comes later would be taken for that of the next request.
            self._connection.close()
            if isinstance(error, WebSocketException | OSError | TimeoutError):
                raise RunFailed(f"the policy server does not answer any more ({error})") from None
            raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
