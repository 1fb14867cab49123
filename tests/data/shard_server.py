"""An HTTP server of one folder, on a port of its own, that can be as unreliable as a test needs it."""

import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer(ThreadingHTTPServer):
    """``url`` is the folder's address; settings may be changed while it runs."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}/sets/mine"
        self.drop_every = 0  # every so many requests are left without an answer
        self.truncate: set[str] = set()  # names whose next answer breaks off in the middle
        self.answers: dict[str, int] = {}  # name -> status code instead of the file
        self.num_dropped = 0
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self._number, self._lock = 0, threading.Lock()

    def is_dropped(self, name: str) -> bool:
        """Counts the request."""
        with self._lock:
            self.requests[name] += 1
            self._number += 1
            is_dropped = bool(self.drop_every) and self._number % self.drop_every == 0
            self.num_dropped += is_dropped
            return is_dropped


class _Answer(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.removeprefix("/sets/mine/")
        self.server.queries.add(query)
        if self.server.is_dropped(name):
            return  # and the connection is closed
        file = self.server.folder / name
        code = self.server.answers.get(name, 200 if file.is_file() else 404)
        data = file.read_bytes() if code == 200 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if name in self.server.truncate:
            self.server.truncate.discard(name)
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path):
    server = ShardServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
