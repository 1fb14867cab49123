"""Word of a rank that ended, among ranks that are threads of one process; test_endings.py kills real ones."""

import socket
import threading
import time

import pytest
import torch

from recap_ds.distributed import lifeline as lifeline_module
from recap_ds.distributed.lifeline import KILLED, Lifeline, Lost
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import UsageError

WAIT = 30.0


class FakeRuntime:
    """Rank ``rank`` of ``world`` in this process: broadcasts and barriers between threads."""

    def __init__(self, rank: int, world: int, shared: dict):
        self.info = RankInfo(rank=rank, world=world, local_rank=rank, local_world=world)
        self._shared = shared

    def broadcast_object(self, value):
        if self.info.is_main:
            self._shared["value"] = value
            self._shared["set"].set()
        assert self._shared["set"].wait(WAIT)
        return self._shared["value"]

    def barrier(self):
        self._shared["barrier"].wait(WAIT)


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(3)`` -> three joined lifelines and, per rank, whom it was told it lost."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def join(world: int) -> tuple[list[Lifeline], list[list[Lost]]]:
        shared = {"set": threading.Event(), "barrier": threading.Barrier(world)}
        told: list[list[Lost]] = [[] for _ in range(world)]
        lines: list[Lifeline] = [None] * world  # type: ignore[list-item]

        def build(rank: int) -> None:
            lines[rank] = Lifeline(FakeRuntime(rank, world, shared), told[rank].append)

        in_parallel(build, world)
        return lines, told

    return join


def in_parallel(function, world: int) -> None:
    threads = [threading.Thread(target=function, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)


def test_one_rank_that_fails_is_known_to_all_with_its_reason_and_code(ranks):
    lines, told = ranks(3)
    lost = Lost(1, "the disk is full", 2)
    assert lines[1].fail("the disk is full", 2, WAIT) == lost
    assert [line.await_lost(WAIT) for line in lines] == [lost] * 3
    settle(told, [0, 2])
    assert told == [[lost], [], [lost]], "the one that failed knows already"


def test_a_rank_that_fails_as_soon_as_it_has_joined_is_heard_and_those_that_join_later_know():
    """Its greeting and its reason arrive at once, and nobody else is there yet."""
    server = lifeline_module._listen_as("127.0.0.1", 2)
    address = ("127.0.0.1", server.getsockname()[1])
    threading.Thread(target=lifeline_module._Exchange(server, "secret", 2).run, daemon=True).start()
    heard = []
    with socket.create_connection(address, timeout=WAIT) as early:
        early.sendall(b'{"token": "secret", "rank": 1}\n{"why": "the disk is full", "code": 2}\n')
        heard.append(lifeline_module._read_line(early))
        with socket.create_connection(address, timeout=WAIT) as late:
            late.sendall(b'{"token": "secret", "rank": 0}\n')
            heard.append(lifeline_module._read_line(late))
    assert heard == [{"rank": 1, "why": "the disk is full", "code": 2}] * 2


def settle(told: list[list[Lost]], ranks: list[int]) -> None:
    deadline = time.monotonic() + WAIT
    while not all(told[rank] for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_first_word_is_the_cause(ranks):
    lines, _ = ranks(3)
    first = lines[2].fail("bad sample", 1, WAIT)
    assert first == Lost(2, "bad sample", 1)
    assert lines[0].fail("connection closed by peer", 1, WAIT) == first


def test_a_reason_of_any_length_and_script_arrives(ranks):
    lines, _ = ranks(2)
    why = 'line\n"quoted" \u00e4 ' * 3000
    assert lines[0].fail(why, 1, WAIT).why == why
    assert lines[1].await_lost(WAIT) == Lost(0, why, 1)


def test_ranks_that_leave_are_no_news(ranks):
    lines, told = ranks(3)
    in_parallel(lambda rank: lines[rank].leave(), 3)
    assert [line.await_lost(0.2) for line in lines] == [None] * 3
    assert told == [[], [], []]


def test_strangers_at_the_port_change_nothing(ranks):
    lines, _ = ranks(2)
    port = lines[0]._line.getpeername()[1]
    for hello in (b"GET / HTTP/1.1\n", b'{"token": "guess", "rank": 0}\n', b""):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as stranger:
            stranger.sendall(hello)
    assert lines[1].fail("real", 1, WAIT) == Lost(1, "real", 1)


def test_one_process_needs_no_line():
    alone = Lifeline(Runtime(RankInfo(), torch.device("cpu"), "gloo"), lambda lost: None)
    assert alone.fail("why", 1, WAIT) == Lost(0, "why", 1)
    alone.leave()


def test_a_rank_0_out_of_reach_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(lifeline_module, "CONNECT_SECONDS", 5.0)
    with pytest.raises(UsageError, match=r"MASTER_ADDR 127\.0\.0\.1 cannot be reached at port 1 "):
        lifeline_module._connect("127.0.0.1", 1)


def test_a_rank_whose_connection_just_ends_was_killed(ranks):
    lines, told = ranks(3)
    lines[2]._line.shutdown(socket.SHUT_RDWR)  # as its kernel does
    assert [lines[rank].await_lost(WAIT) for rank in (0, 1)] == [Lost(2, KILLED, 1)] * 2
    settle(told, [0, 1])
    assert told[:2] == [[Lost(2, KILLED, 1)]] * 2
