"""Messages of the ``openpi-client`` package: msgpack, with numpy arrays as maps of bytes, dtype and shape.

What comes in is not trusted. Arrays are of plain numbers (no object array, nothing that runs code), their bytes are
exactly those of their shape, and how many things a message may hold is bounded: an empty map is one byte on the wire
and sixty in memory. The size of a message in bytes is bounded by the server.
"""

import math
from typing import Any

import msgpack
import numpy as np

from recap_ds.errors import UsageError

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DTYPES = {name: np.dtype(name) for name in ("|b1", "|u1", "|i1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")}
MAX_DIMS = 4
# Of a message: maps and lists together (arrays are maps), entries of one, characters of a text.
MAX_CONTAINERS = 256
MAX_ENTRIES = 1024
MAX_TEXT_BYTES = 2**16


def pack(message: dict[str, Any]) -> bytes:
    return msgpack.packb(message, default=_plain)


def unpack(data: bytes) -> Any:
    """UsageError for anything but a whole message within the bounds. Arrays are views of its bytes, read-only."""
    num_containers = 0

    def counted(container: Any) -> Any:
        nonlocal num_containers
        num_containers += 1
        if num_containers > MAX_CONTAINERS:
            raise UsageError(f"message: holds more than {MAX_CONTAINERS} maps and lists")
        return container

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda mapping: _numpy(counted(mapping)),
            list_hook=counted,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_str_len=MAX_TEXT_BYTES,
            max_ext_len=0,
        )
    except UsageError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"message: is not msgpack as openpi-client writes it ({reason[:100]})") from None


def _plain(value: Any) -> dict[bytes, Any]:
    """msgpack's ``default``: numpy's own as maps."""
    if isinstance(value, np.ndarray) and value.dtype.str in DTYPES:
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.str in DTYPES:
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise UsageError(f"message: {type(value).__name__} cannot be sent; give numbers, texts and arrays of numbers")


def _numpy(mapping: dict) -> Any:
    """msgpack's ``object_hook``: a map back to what it stands for."""
    if ARRAY in mapping:
        return _array(mapping)
    if SCALAR in mapping:
        value = mapping.get(b"data")
        if type(value) not in (bool, int, float):
            raise UsageError("message: holds a numpy scalar that is no number")
        return value
    return mapping


def _array(mapping: dict) -> np.ndarray:
    data, name, shape = mapping.get(b"data"), mapping.get(b"dtype"), mapping.get(b"shape")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise UsageError(f"message: holds an array of dtype {str(name)[:20]!r}; allowed are {', '.join(DTYPES)}")
    sizes_are_whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes_are_whole or len(shape) > MAX_DIMS:
        raise UsageError(f"message: holds an array whose shape is not at most {MAX_DIMS} whole numbers")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise UsageError(f"message: holds an array whose bytes are not those of {dtype} {shape}")
    return np.frombuffer(data, dtype).reshape(shape)
