"""The server, over real sockets of this machine: right answers, and what it refuses without harm to others."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from recap_ds.cli.main import main
from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.export_format import ExportRecord
from tests.serve.made import API_KEY, TOLERANCE, load_made, request, right_answer

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")
import websockets
from websockets.sync.client import connect

from recap_ds.serve.client import PolicyClient
from recap_ds.serve.codec import pack, unpack
from recap_ds.serve.run import serving
from recap_ds.serve.server import ServerSettings

HOST = "127.0.0.1"
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.fixture
def client(port):
    with PolicyClient(HOST, port, API_KEY) as client:
        yield client


def open_raw(port, **options):
    """A websocket without any manners of a client."""
    headers = {"Authorization": f"Api-Key {API_KEY}"}
    raw = connect(f"ws://{HOST}:{port}", additional_headers=headers, proxy=None, compression=None, **options)
    raw.recv(10)  # metadata
    return raw


# -- answers ----------------------------------------------------------------------------------------------------------


def test_metadata_says_how_to_ask_and_who_answers(client, export):
    record = ExportRecord.load(export)
    said = json.loads(json.dumps(client.metadata))
    assert said.pop("export")["content_sha256"] == record.content_hash()
    assert said == {
        "cameras": ["front", "wrist"],
        "image_size": [32, 32],
        "state_dim": 3,
        "action_dim": 2,
        "chunk_size": 4,
        "fps": 10.0,
        "example_prompt": "push",
    }


def test_actions_are_those_of_the_robot_policy_bit_for_bit(client, robot):
    for number in range(4):  # every kind of option
        reply = client.infer(request(number))
        assert reply["actions"].dtype == np.float32
        np.testing.assert_array_equal(reply["actions"], right_answer(robot, request(number)))
        timing = reply["server_timing"]
        assert timing["batch_size"] == 1 and 0 < timing["infer_ms"] < timing["total_ms"]
    assert not np.array_equal(*(client.infer(request(0, seed=None))["actions"] for _ in range(2)))


def test_openpi_client_gets_the_same_actions(port, robot):
    """The package itself, where it is installed (it wants numpy below 2: ``pip install --no-deps openpi-client``)."""
    policy = pytest.importorskip("openpi_client.websocket_client_policy", reason="openpi-client is not installed")
    client = policy.WebsocketClientPolicy(HOST, port, api_key=API_KEY)
    assert client.get_server_metadata()["cameras"] == ["front", "wrist"]
    for number in range(4):
        actions = client.infer(request(number))["actions"]
        np.testing.assert_array_equal(actions, right_answer(robot, request(number)))
    with pytest.raises(RuntimeError, match="observation/state: expected 3 finite numbers"):
        client.infer(request(0, **{"observation/state": np.zeros(4, np.float32)}))
    assert client.infer(request(1))["actions"].shape == (4, 2)


def test_company_changes_nothing_but_rounding(port, robot):
    answers, sizes = {}, []

    def ask(numbers):
        with PolicyClient(HOST, port, API_KEY) as client:
            for number in numbers:
                reply = client.infer(request(number))
                answers[number] = reply["actions"]
                sizes.append(reply["server_timing"]["batch_size"])

    threads = [threading.Thread(target=ask, args=(range(first, 48, 8),)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(sizes) > 1 and len(answers) == 48
    for number, actions in answers.items():
        np.testing.assert_allclose(actions, right_answer(robot, request(number)), **TOLERANCE)


def test_single_actions_walk_through_a_chunk(client, robot):
    chunk = right_answer(robot, request(0))
    walked = [client.infer(request(0, single_action=True)) for _ in range(5)]
    assert walked[0]["actions"].shape == (1, 2)
    np.testing.assert_array_equal(np.concatenate([reply["actions"] for reply in walked[:4]]), chunk)
    np.testing.assert_array_equal(walked[4]["actions"], chunk[:1])  # the next chunk, with the same seed
    assert ["infer_ms" in reply["server_timing"] for reply in walked] == [True, False, False, False, True]
    other = right_answer(robot, request(1))
    reset = client.infer(request(1, single_action=True, reset=True))["actions"]
    np.testing.assert_array_equal(reset, other[:1])
    # A whole chunk is a new one, and leaves nothing behind.
    np.testing.assert_array_equal(client.infer(request(0))["actions"], chunk)
    np.testing.assert_array_equal(client.infer(request(1, single_action=True))["actions"], other[:1])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observation/front": np.zeros((24, 32), np.uint8)}, "observation/front: expected uint8"),
        ({"observation/front": np.zeros((24, 32, 3), np.float32)}, "observation/front: expected uint8"),
        ({"observation/state": np.zeros(4, np.float32)}, "observation/state: expected 3 finite numbers"),
        ({"observation/state": np.full(3, np.nan, np.float32)}, "observation/state: expected 3 finite numbers"),
        ({"observation/state": np.full(3, 1e38, np.float32)}, "no action comes of it"),
        ({"prompt": np.zeros((50, 50), np.uint8)}, "prompt: expected text, got ndarray$"),
        ({"prompt": "word " * 50}, "model.max_prompt_tokens: 40 is too few"),
        ({"advantage": "great"}, "advantage: 'great' is not 'positive', 'negative' or None"),
        ({"guidance_beta": float("inf")}, "guidance_beta: inf is not a finite number"),
        ({"guidance_beta": 1e38}, "no action comes of it"),
        ({"seed": -1}, "seed: -1 is not a whole number"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not a whole number"),
        ({"advantge": None}, "did you mean 'advantage'"),
    ],
)
def test_a_wrong_request_is_told_so_and_the_next_is_answered(client, robot, changes, said):
    with pytest.raises(UsageError, match=said):
        client.infer(request(2, **changes))
    np.testing.assert_array_equal(client.infer(request(2))["actions"], right_answer(robot, request(2)))


def test_a_missing_camera_is_told(client):
    asked = request(0)
    del asked["observation/wrist"]
    with pytest.raises(UsageError, match="'observation/wrist' is missing"):
        client.infer(asked)


@pytest.mark.parametrize("message", [b"\xc1garbage", b"", "a text", pack([1, 2])])
def test_a_message_that_is_none_is_told_so(port, robot, message):
    with open_raw(port) as raw:
        raw.send(message)
        assert raw.recv(10).startswith("message: ")
        raw.send(pack(request(3)))
        np.testing.assert_array_equal(unpack(raw.recv(10))["actions"], right_answer(robot, request(3)))


def test_a_message_beyond_the_limit_closes_its_own_connection(port, client, robot):
    with open_raw(port) as raw, pytest.raises(websockets.ConnectionClosedError, match="1009"):
        raw.send(b"\0" * 300_000)
        raw.recv(10)
    np.testing.assert_array_equal(client.infer(request(0))["actions"], right_answer(robot, request(0)))


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
    with pytest.raises(websockets.InvalidStatus, match="403"):
        open_raw(port, origin="http://some.page")


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


# -- the program ------------------------------------------------------------------------------------------------------


def start_program(export, *flags):
    command = [sys.executable, "-m", "recap_ds.cli.main", "serve", str(export), "--port", "0", "--device", "cpu"]
    program = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = program.stdout.readline()
    assert said.startswith(f"serving {export} in float32 on cpu: ws://127.0.0.1:"), program.communicate()
    return program, int(said.rsplit(":", 1)[1])


def test_sigterm_ends_it_well(export, robot):
    program, port = start_program(export)
    replies = []

    def ask_until_it_ends():
        with PolicyClient(HOST, port) as busy, contextlib.suppress(RunFailed):
            replies.extend(busy.infer(request(number)) for number in itertools.count())

    try:
        with PolicyClient(HOST, port) as idle:
            busy_thread = threading.Thread(target=ask_until_it_ends)
            busy_thread.start()
            while not replies:
                time.sleep(0.01)
            program.send_signal(signal.SIGTERM)
            said, problems = program.communicate(timeout=60)
            busy_thread.join()
            with pytest.raises(RunFailed, match="1001"):
                idle.infer(request(0))
    finally:
        program.kill()
    assert (program.returncode, problems) == (0, "")
    # Everything that was answered has arrived.
    assert said.splitlines()[-1].startswith(f"{len(replies)} requests of 2 clients answered; 0 requests and 0 clients")
    np.testing.assert_array_equal(replies[-1]["actions"], right_answer(robot, request(len(replies) - 1)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: is reached from other machines; give --api-key"),
        (["--host", "robot.example"], "give --api-key"),
        (["--host", "::", "--api-key", "short"], "--api-key: give at least 16 printable characters"),
        (["--api-key", "schlüssel-schlüssel"], "--api-key: give at least 16 printable characters"),
        (["--port", "65536"], "'65536' is not a port"),
        (["--max-batch", "0"], "'0' is not a whole number of at least 1"),
        (["--max-message", "1"], "--max-message 1: give a size"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
    ],
)
def test_wrong_flags_are_one_line(export, flags, said, capsys):
    assert main(["serve", str(export), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(export, port, capsys):
    assert main(["serve", str(export), "--port", str(port), "--device", "cpu"]) == 1
    assert f"127.0.0.1:{port}: cannot be listened on" in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(export, tmp_path):
    """An interpreter that cannot see websockets."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'websockets' else find(name, *more)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "recap_ds.cli.main", "serve", str(export)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: recap-ds serve: needs websockets; pip install -e '.[serve]' brings what it needs\n"
