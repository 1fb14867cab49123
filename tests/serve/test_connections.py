"""Who may connect, for how long, and what becomes of requests whose server or client goes away."""

import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from recap_ds.errors import RunFailed, UsageError
from tests.serve.made import API_KEY, load_made, request, right_answer

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")
import websockets
from websockets.sync.client import connect

from recap_ds.serve.client import PolicyClient
from recap_ds.serve.codec import pack
from recap_ds.serve.run import serving
from recap_ds.serve.server import ServerSettings

HOST = "127.0.0.1"
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.mark.parametrize("key", [None, "", "wrong", API_KEY + "x", API_KEY[:-1], "k" * 5000, "schlüssel"])
def test_a_wrong_key_is_refused_before_any_payload(port, key):
    """The whole answer comes to a client that has sent its HTTP request alone."""
    header = b"" if key is None else f"Authorization: Api-Key {key}\r\n".encode()
    with socket.create_connection((HOST, port), timeout=10) as raw:
        raw.sendall(HANDSHAKE + header + b"\r\n")
        answer = b""
        while part := raw.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"wrong or missing API key\n")


def test_our_client_says_when_it_is_refused(port):
    with pytest.raises(RunFailed, match=r"no policy server answers .*401"):
        PolicyClient(HOST, port, "wrong")


def test_a_web_page_cannot_connect(port):
    headers = {"Authorization": f"Api-Key {API_KEY}"}
    with pytest.raises(websockets.InvalidStatus, match="403"):
        connect(f"ws://{HOST}:{port}", additional_headers=headers, proxy=None, origin="http://some.page")


def test_health_needs_no_key(port):
    with urllib.request.urlopen(f"http://{HOST}:{port}/healthz", timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://{HOST}:{port}/other", timeout=10)


def test_no_more_clients_than_the_limit(robot):
    with serving(robot, {}, ServerSettings(port=0, max_clients=2)) as port:
        first, second = PolicyClient(HOST, port), PolicyClient(HOST, port)
        with pytest.raises(RunFailed, match="503"):
            PolicyClient(HOST, port)
        first.close()
        with PolicyClient(HOST, port) as third:
            assert third.infer(request(0))["actions"].shape == (4, 2)
        second.close()


def test_who_stops_answering_is_let_go(robot):
    """Before the handshake, in the middle of a frame and in silence after it: half-open sockets."""
    settings = ServerSettings(port=0, max_clients=2, ping_seconds=2.0, handshake_seconds=3.0)
    with serving(robot, {}, settings) as port:
        silent = [socket.create_connection((HOST, port), timeout=10) for _ in range(3)]
        for raw in silent[1:]:
            raw.sendall(HANDSHAKE + b"\r\n")
        silent[2].sendall(b"\x82\xff\x00\x00")
        for raw in silent:
            while raw.recv(4096):
                pass  # until the server closes it
            raw.close()
        with PolicyClient(HOST, port) as client:
            np.testing.assert_array_equal(client.infer(request(0))["actions"], right_answer(robot, request(0)))


def test_a_request_that_is_computed_is_answered_before_the_end(export, robot):
    served, _ = load_made(export)
    begun, go, whole, replies = threading.Event(), threading.Event(), served.predict_chunks, []

    def slow(requests):
        begun.set()
        assert go.wait(10)
        return whole(requests)

    served.predict_chunks = slow
    with serving(served, {}, ServerSettings(port=0)) as port:
        client = PolicyClient(HOST, port)
        asking = threading.Thread(target=lambda: replies.append(client.infer(request(1))))
        asking.start()
        assert begun.wait(10)
        threading.Timer(0.2, go.set).start()
    # The server was told to stop 0.2 s before the model was done.
    asking.join()
    np.testing.assert_array_equal(replies[0]["actions"], right_answer(robot, request(1)))
    with pytest.raises(RunFailed, match="1001"):
        client.infer(request(1))


def test_an_answer_that_takes_too_long_is_not_waited_for_at_the_end(export):
    served, _ = load_made(export)
    begun, go, ended = threading.Event(), threading.Event(), []

    def slow(requests):
        begun.set()
        assert go.wait(10)
        return [np.zeros((4, 2), np.float32)]

    def ask(client):
        with pytest.raises(RunFailed, match="does not answer any more"):
            client.infer(request(1))
        ended.append(not go.is_set())  # cut off while the model still computed
        go.set()

    served.predict_chunks = slow
    with serving(served, {}, ServerSettings(port=0, drain_seconds=0.3)) as port:
        asking = threading.Thread(target=ask, args=(PolicyClient(HOST, port),))
        asking.start()
        assert begun.wait(10)
    asking.join()
    assert ended == [True]


def test_who_leaves_before_the_answer_takes_no_place(export, robot):
    """Requests of those who left are not computed, and their places are free at once."""
    served, _ = load_made(export)
    begun, go, whole, computed = threading.Event(), threading.Event(), served.predict_chunks, []

    def slow(requests):
        computed.append(len(requests))
        begun.set()
        assert go.wait(10)
        return whole(requests)

    served.predict_chunks = slow
    with serving(served, {}, ServerSettings(port=0, max_clients=3)) as port:
        for number in range(6):
            with connect(f"ws://{HOST}:{port}", proxy=None) as raw:
                raw.recv(10)
                raw.send(pack(request(number)))
                assert begun.wait(10)
        go.set()
        with PolicyClient(HOST, port) as client:
            np.testing.assert_array_equal(client.infer(request(1))["actions"], right_answer(robot, request(1)))
    assert computed == [1, 1]


def test_a_late_answer_is_not_taken_for_the_next(export):
    served, _ = load_made(export)
    go, whole = threading.Event(), served.predict_chunks
    served.predict_chunks = lambda requests: (go.wait(10), whole(requests))[1]
    with serving(served, {}, ServerSettings(port=0)) as port:
        client = PolicyClient(HOST, port, timeout_seconds=2.0)
        with pytest.raises(RunFailed, match="the policy server does not answer any more"):
            client.infer(request(0))
        go.set()
        with pytest.raises(RunFailed, match="the policy server does not answer any more"):
            client.infer(request(1))


def test_a_fault_of_ours_is_told_and_printed(export, capsys):
    served, _ = load_made(export)
    whole = served.predict_chunks
    served.predict_chunks = lambda requests: [][0] if broken else whole(requests)
    broken = True
    with serving(served, {}, ServerSettings(port=0)) as port, PolicyClient(HOST, port) as client:
        health = f"http://{HOST}:{port}/healthz"
        for _ in range(2):  # and the connection lives
            with pytest.raises(UsageError, match="the server failed on this request; its log says why"):
                client.infer(request(1))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(health, timeout=10)
        broken = False
        assert client.infer(request(1))["actions"].shape == (4, 2)
        assert urllib.request.urlopen(health, timeout=10).status == 200
    assert "IndexError" in capsys.readouterr().err
