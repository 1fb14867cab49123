"""numpy's file formats, read without trust: no pickle, no size that a header only claims, every checksum compared."""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_array(data: bytes) -> np.ndarray:
    """The other way. ValueError for anything but one whole plain array; never unpickles, never trusts a size."""
    version = np.lib.format.read_magic(io.BytesIO(data))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not read here")
    start = 10 if version == (1, 0) else 12
    end = start + int.from_bytes(data[8:start], "little")
    shape, fortran_order, dtype = _parse_header(version, data[8:end])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(f"{len(data) - end} bytes of data for shape {list(shape)} of {dtype}")
    flat = np.frombuffer(data, dtype=dtype, offset=end)
    return flat.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=256)  # every sample of a data set has the same few, and parsing one takes longer than all else here
def _parse_header(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(io.BytesIO(header))
    except (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"damaged npy header ({_shortly(error)})") from None
    if dtype.hasobject:
        raise ValueError("an object array would need pickle")
    return shape, fortran_order, dtype


def npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that np.savez wrote. OSError where it cannot be read, ValueError where it is damaged.

    np.load would compare no checksum of an array whose header claims less than there is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("a member is compressed, which np.savez never does")
                arrays[member.filename.removesuffix(".npy")] = npy_array(archive.read(member))
            return arrays
    # All that zipfile makes of damaged bytes.
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, IndexError, zlib.error, struct.error) as error:
        raise ValueError(_shortly(error)) from None


def _shortly(error: Exception) -> str:
    """In one line of a terminal, though numpy writes several, and zipfile the damaged bytes themselves."""
    text = "".join(letter if letter.isascii() and letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:100] or type(error).__name__
