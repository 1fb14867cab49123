"""Success and failure that all ranks share: a rank that raises alone leaves the others waiting in a collective.

A wrong input becomes the same UsageError everywhere, a disk or folder that fails the same RunFailed. Anything else is
our bug: it keeps its traceback on the rank it happened on.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from recap_ds.distributed.reduce import agree, gather_flat
from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import RunFailed, UsageError

Result = TypeVar("Result")
MESSAGE_BYTES = 512


def on_main(runtime: Runtime, function: Callable[[], Result]) -> Result:
    """Rank 0 calls ``function``; every rank gets its value, through JSON, or its failure.

    Collective: every rank must call.
    """
    value, error = None, None
    if runtime.info.is_main:
        try:
            value = function()
        except Exception as caught:  # raised below, on every rank
            error = caught
    outcome = runtime.broadcast_object({"value": value, "failure": _describe(error)})
    if outcome["failure"] is not None:
        _raise(error, outcome["failure"], 0)
    return outcome["value"]


def on_every_rank(runtime: Runtime, function: Callable[[], Result]) -> Result:
    """Every rank calls ``function``, which must hold no collective; where one fails, all raise.

    Collective: every rank must call.
    """
    value, error = None, None
    try:
        value = function()
    except Exception as caught:  # raised below, on every rank
        error = caught
    if agree(error is not None, runtime.device):
        messages = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in _all_messages(runtime, error)]
        rank = next(rank for rank, message in enumerate(messages) if message)
        _raise(error, messages[rank], rank)
    return value


def gather_objects(runtime: Runtime, value: Any) -> list[Any]:
    """Every rank's small ``value``, in rank order, through JSON. Collective: every rank must call."""
    text = json.dumps(value).encode()
    length = agree(len(text), runtime.device)
    row = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device=runtime.device)
    return [json.loads(bytes(gathered)) for gathered in gather_flat(row).view(-1, length).tolist()]


def _all_messages(runtime: Runtime, error: Exception | None) -> list[list[int]]:
    text = ("" if error is None else _describe(error)).encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    row = torch.tensor(list(text), dtype=torch.uint8, device=runtime.device)
    return gather_flat(row).view(-1, MESSAGE_BYTES).tolist()


def _describe(error: Exception | None) -> str | None:
    """One letter for the kind, then the message: U wrong input, F a file that fails, B a bug."""
    if error is None:
        return None
    if isinstance(error, UsageError):
        return f"U{error}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"F{where}{error.strerror or error}"
    return f"B{type(error).__name__}: {error}"


def _raise(mine: Exception | None, message: str, rank: int) -> NoReturn:
    kind, text = message[0], message[1:]
    if kind == "B":
        if mine is not None:
            raise mine
        raise RuntimeError(f"rank {rank} failed: {text}")
    where = f"rank {rank}: " if rank else ""
    raise (UsageError if kind == "U" else RunFailed)(f"{where}{text}") from mine
