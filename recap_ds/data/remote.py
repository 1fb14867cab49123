"""Where remote files come from: an address and a file's name become blocks of bytes.

    http(s)://HOST/PATH   a query behind it (a signature, say) stays behind every name
    s3://BUCKET/PATH      through aws, gs:// through gcloud or gsutil: they know the user's credentials
    hf://datasets/OWNER/NAME[@REVISION][/PATH]   a data set on the Hugging Face hub, with the token of 'hf auth login'
    pipe:COMMAND          a shell command that writes the file {name} to its standard output

Here a transfer either ends whole or raises; whether what came is what was wanted, and whether to try again, is decided
in ``fetch.py``. It knows nothing of shards.
"""

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import IO, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from recap_ds.errors import UsageError

BLOCK_BYTES = 2**20
STALL_SECONDS = 60.0  # without a byte: the connection is given up
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<path>.+))?")
NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # of files asked for
# Answers that mean what they say; others, among them 408, 425, 429 and all from 500 on, may be different next time.
GONE_CODES, REFUSING_CODES = (404, 410), (400, 401, 402, 403, 405, 407, 451)
# The same in what aws, gcloud, gsutil, curl and cat print.
GONE_WORDS = ("(404)", "NoSuchKey", "matched no objects", "No URLs matched", "error: 404", "No such file or directory")
REFUSING_WORDS = (
    *("(403)", "HTTPError 403", "AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "ExpiredToken"),
    *("locate credentials", "active account", "auth login"),
)


class TransferFailed(Exception):
    """A transfer that broke off, or never began. Another one may do better."""


class Refused(TransferFailed):
    """The other side does not want to: no use in asking again."""


class NotThere(TransferFailed):
    """The other side answered that it has no such file."""


class Origin(Protocol):
    """Picklable: loader workers hold a copy."""

    place: str  # for messages: without what may be secret

    def read(self, name: str) -> Iterator[bytes]:
        """The file's blocks; TransferFailed unless all of them came. Close it if you stop early."""
        ...


def is_remote(place: str) -> bool:
    return ADDRESS.match(place) is not None


def open_origin(place: str) -> Origin:
    """UsageError for an address that is none of the kinds above, or needs a tool that is not here. Asks nobody."""
    scheme = place.partition(":")[0].lower()
    match scheme:
        case "http" | "https":
            return HttpOrigin.at(place)
        case "hf":
            return _on_the_hub(place)
        case "s3":
            _need("aws", "s3://", "pip install awscli")
            return CommandOrigin(place, ("aws", "s3", "cp", "--only-show-errors", f"{place.rstrip('/')}/{{name}}", "-"))
        case "gs":
            words = ("gcloud", "storage", "cat") if shutil.which("gcloud") else ("gsutil", "-q", "cat")
            _need(words[0], "gs://", "install the Google Cloud CLI")
            return CommandOrigin(place, (*words, f"{place.rstrip('/')}/{{name}}"))
        case "pipe":
            if "{name}" not in place:
                raise UsageError(
                    f"data.shards: {place}: the command must say where a file's name goes, as in "
                    "'pipe:ssh store cat /sets/mine/{name}'"
                )
            return CommandOrigin(place, ("/bin/sh", "-c", place.removeprefix("pipe:")))
    raise UsageError(
        f"data.shards: {place}: '{scheme}' is none of http, https, s3, gs, hf and pipe; give a local folder by its path"
    )


def _need(tool: str, scheme: str, mend: str) -> None:
    if shutil.which(tool) is None:
        raise UsageError(f"data.shards: {scheme} needs the command '{tool}', which is not on PATH; {mend}")


@dataclass(frozen=True)
class HttpOrigin:
    place: str
    base: str  # ends with a slash
    query: str = field(default="", repr=False)
    token: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, place: str, token: str | None = None) -> "HttpOrigin":
        parts = urlsplit(place)
        if not parts.hostname or parts.username is not None:
            raise UsageError(
                f"data.shards: {parts.scheme}://{parts.hostname or ''}: give a host, without a name or a password"
            )
        base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/", "", ""))
        return cls(base.rstrip("/"), base, f"?{parts.query}" if parts.query else "", token)

    def read(self, name: str) -> Iterator[bytes]:
        assert NAMES.fullmatch(name), name
        request = Request(f"{self.base}{quote(name)}{self.query}", headers={"User-Agent": "recap_ds"})
        if self.token is not None:
            # Not sent along when the hub redirects to its store.
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            with urlopen(request, timeout=STALL_SECONDS) as response:
                yield from _body(response)
        except HTTPError as error:
            said = f"the server says {error.code} {error.reason}"
            error.close()
            kind = NotThere if error.code in GONE_CODES else Refused if error.code in REFUSING_CODES else TransferFailed
            raise kind(said) from None
        except URLError as error:
            raise TransferFailed(str(error.reason)) from None
        except (OSError, HTTPException, ValueError) as error:
            raise TransferFailed(str(error) or type(error).__name__) from None


def _body(response: HTTPResponse) -> Iterator[bytes]:
    # A connection that closes early looks like an end: only the length tells.
    length, received = response.headers.get("Content-Length"), 0
    while block := response.read(BLOCK_BYTES):
        received += len(block)
        yield block
    if length is not None and received != int(length):
        raise TransferFailed(f"{received} of {length} bytes came")


def _on_the_hub(place: str) -> HttpOrigin:
    # Here, because local shards have no use for it.
    from huggingface_hub import get_token, hf_hub_url

    found = HUB.fullmatch(place.rstrip("/"))
    if found is None:
        raise UsageError(f"data.shards: {place}: write hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    url = hf_hub_url(found["repo"], found["path"] or ".", repo_type="dataset", revision=found["revision"])
    origin = HttpOrigin.at(url if found["path"] else url.removesuffix("."), get_token())
    return HttpOrigin(place, origin.base, origin.query, origin.token)


@dataclass(frozen=True)
class CommandOrigin:
    place: str
    words: tuple[str, ...]  # {name} stands for the file

    def read(self, name: str) -> Iterator[bytes]:
        assert NAMES.fullmatch(name), name
        words = [word.replace("{name}", shlex.quote(name)) for word in self.words]
        with tempfile.TemporaryFile() as said:
            try:
                # A session of its own: it can be ended with all that it started, and Ctrl-C is not its business.
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
                )
            except OSError as error:
                raise TransferFailed(f"{words[0]}: {error.strerror}") from None
            try:
                yield from _output(process.stdout)
                code = process.wait(STALL_SECONDS)
            except subprocess.TimeoutExpired:
                raise TransferFailed(f"{words[0]} does not end") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
            if code:
                raise _failure(words[0], code, said)


def _output(stream: IO[bytes]) -> Iterator[bytes]:
    ready = select.poll()
    ready.register(stream.fileno(), select.POLLIN | select.POLLHUP)
    while True:
        if not ready.poll(STALL_SECONDS * 1000):
            raise TransferFailed(f"not a byte for {STALL_SECONDS:g} s")
        block = os.read(stream.fileno(), BLOCK_BYTES)
        if not block:
            return
        yield block


def _failure(tool: str, code: int, said: IO[bytes]) -> TransferFailed:
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
    text = said.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Some go on to explain themselves.
    telling = [line for line in lines if "error" in line.lower() or "exception" in line.lower()] or lines[-1:]
    what = f"{tool}: {telling[0]}" if telling else f"{tool} ended with exit code {code}"
    for kind, words in ((NotThere, GONE_WORDS), (Refused, REFUSING_WORDS)):
        if any(word in text for word in words):
            return kind(what)
    return TransferFailed(what)
