import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from recap_ds.processing.images import decode_jpeg, encode_jpeg, resize_with_padding


def test_a_wide_picture_is_centred_between_black_bars():
    square = resize_with_padding(np.full((32, 64, 3), 200, dtype=np.uint8), 16)
    assert square.shape == (16, 16, 3) and square.dtype == np.uint8
    assert (square[:4] == 0).all() and (square[12:] == 0).all()
    assert (square[4:12] == 200).all()


def test_a_tall_picture_is_centred_too():
    square = resize_with_padding(np.full((30, 10, 3), 90, dtype=np.uint8), 60)
    filled = (square == 90).all(axis=(0, 2))
    assert np.flatnonzero(filled).tolist() == list(range(20, 40))


def test_the_right_size_is_left_alone():
    picture = np.random.default_rng(0).integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_with_padding(picture, 24), picture)


def test_shrinking_averages_a_fine_pattern():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = resize_with_padding(np.repeat(checkers[:, :, None], 3, axis=2).astype(np.uint8), 16)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 10


def test_jpeg_round_trip_keeps_a_smooth_picture():
    ramp = np.linspace(0, 255, 32)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 128.0), axis=2).astype(np.uint8)
    assert np.abs(decode_jpeg(encode_jpeg(picture)).astype(int) - picture).mean() < 3


def test_a_grey_jpeg_becomes_rgb():
    assert decode_jpeg(encode_jpeg(np.full((8, 8), 77, dtype=np.uint8))).shape == (8, 8, 3)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "png", "huge"])
def test_what_is_no_whole_jpeg_is_a_value_error(damage):
    whole = encode_jpeg(np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8))
    size = whole.index(b"\xff\xc0") + 5  # of the frame header: height and width
    data = {
        "empty": b"",
        "text": b"hello" * 9,
        "cut": whole[: len(whole) // 2],
        "png": b"\x89PNG\r\n\x1a\n" + whole,
        "huge": whole[:size] + b"\xff\x00\xff\x00" + whole[size + 4 :],
    }
    with pytest.raises(ValueError, match="not a whole JPEG"):
        decode_jpeg(data[damage])


def test_damage_is_a_value_error_or_a_picture_and_nothing_else():
    generator = np.random.default_rng(1)
    whole = encode_jpeg(generator.integers(0, 256, size=(24, 40, 3), dtype=np.uint8))
    for _ in range(300):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        with contextlib.suppress(ValueError):
            picture = decode_jpeg(bytes(data))
            assert picture.dtype == np.uint8 and picture.shape[2] == 3


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 3), (15, 17, 3), (96, 96, 3), (33, 50)])
def test_the_pixels_are_those_of_pil(shape, subsampling):
    ramp = np.add.outer(np.arange(shape[0]) * 5, np.arange(shape[1]) * 3)
    ramp = ramp if len(shape) == 2 else ramp[..., None] * [1, 2, 3]
    noise = np.random.default_rng(2).integers(0, 64, size=shape)
    for quality in (50, 95):
        buffer = io.BytesIO()
        picture = ((ramp + noise) % 256).astype(np.uint8)
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        with Image.open(buffer) as image:
            np.testing.assert_array_equal(decode_jpeg(buffer.getvalue()), np.asarray(image.convert("RGB")))
