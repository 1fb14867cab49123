"""The server, over real sockets of this machine: right answers, and what it says of wrong requests."""

import json
import threading

import numpy as np
import pytest

from recap_ds.errors import UsageError
from recap_ds.models.export_format import ExportRecord
from tests.serve.made import API_KEY, TOLERANCE, request, right_answer

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")
import websockets
from websockets.sync.client import connect

from recap_ds.serve.client import PolicyClient
from recap_ds.serve.codec import pack, unpack

HOST = "127.0.0.1"


@pytest.fixture
def client(port):
    with PolicyClient(HOST, port, API_KEY) as client:
        yield client


def open_raw(port):
    """A websocket without any manners of a client."""
    headers = {"Authorization": f"Api-Key {API_KEY}"}
    raw = connect(f"ws://{HOST}:{port}", additional_headers=headers, proxy=None, compression=None)
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
        ({"guidance_beta": float("inf")}, "guidance_beta: inf is not a number from -100 to 100"),
        ({"guidance_beta": 10**18}, "is not a number from -100 to 100"),
        ({"prompt": " "}, "prompt: is empty"),
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
