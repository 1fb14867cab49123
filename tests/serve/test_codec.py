"""Messages: what goes through unchanged, and what a hostile one may not do."""

import contextlib
import random

import numpy as np
import pytest

from recap_ds.errors import UsageError

pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")
import msgpack

from recap_ds.serve.codec import ARRAY, DTYPES, MAX_CONTAINERS, MAX_ENTRIES, SCALAR, pack, unpack


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrays_go_there_and_back(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    back = unpack(pack({"a": array, "empty": array[:0], "transposed": array.T}))
    assert back["a"].dtype == dtype and back["empty"].shape == (0, 3, 4)
    np.testing.assert_array_equal(back["a"], array)
    np.testing.assert_array_equal(back["transposed"], array.T)


def test_plain_values_and_numpy_scalars_go_through():
    sent = {"prompt": "päck", "seed": 2**63 - 1, "beta": 1.5, "none": None, "yes": True, "list": [1, [2.5]]}
    assert unpack(pack(sent)) == sent
    assert unpack(pack({"beta": np.float32(1.5), "seed": np.int64(7)})) == {"beta": 1.5, "seed": 7}


def array_map(**changes):
    entries = {"data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return {ARRAY: True, **{key.encode(): value for key, value in entries.items() if value is not None}}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "|O"},
        {"dtype": "O"},
        {"dtype": "<U2"},
        {"dtype": "|V4"},
        {"dtype": "<c8"},
        {"dtype": ">f4"},
        {"dtype": "<M8[s]"},
        {"dtype": b"<f4"},
        {"dtype": [["a", "<f4"]]},
        {"dtype": None},
        {"shape": [3]},
        {"shape": [-1]},
        {"shape": [2**62, 2**62]},
        {"shape": [1, 1, 1, 1, 2]},
        {"shape": 2},
        {"shape": [2.0]},
        {"shape": [True, 2]},
        {"shape": None},
        {"data": "text"},
        {"data": [0] * 8},
        {"data": None},
    ],
    ids=str,
)
def test_arrays_that_are_not_plain_are_refused(changes):
    unpack(msgpack.packb({"a": array_map()}))  # as it stands it is well
    with pytest.raises(UsageError, match="message: holds an array"):
        unpack(msgpack.packb({"a": array_map(**changes)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({"a": 1})[:-1],
        msgpack.packb({"a": 1}) + b"\0",
        msgpack.packb({(1, 2): 3}),
        msgpack.packb({"a": "x" * (2**16 + 1)}),
        msgpack.packb(msgpack.ExtType(5, b"payload")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x81\xa1a\xa1\xff",  # a text that is no UTF-8
        msgpack.packb({SCALAR: True, b"data": "text", b"dtype": "<f4"}),
        b"\x91" * 5000 + b"\xc0",
        msgpack.packb([0] * (MAX_ENTRIES + 1)),
        msgpack.packb([{}] * (MAX_CONTAINERS + 1)),
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
    ],
    ids=lambda data: data[:12].hex() or "empty",
)
def test_what_is_no_message_is_one_line(data):
    with pytest.raises(UsageError, match=r"^message: ") as error:
        unpack(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_any_bytes_give_a_value_or_that_line():
    chance = random.Random(0)
    whole = pack({"image": np.zeros((4, 4, 3), np.uint8), "state": np.ones(3, np.float32), "seed": 3})
    for _ in range(3000):
        data = bytearray(whole if chance.random() < 0.7 else chance.randbytes(chance.randrange(60)))
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(UsageError):
            unpack(bytes(data))


def test_what_cannot_be_sent_is_said():
    for value in (np.array([object()]), np.array(["a"]), object(), np.zeros(2, np.complex64)):
        with pytest.raises(UsageError, match="cannot be sent"):
            pack({"a": value})
