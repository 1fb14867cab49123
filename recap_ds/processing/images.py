"""Pictures: square resizing, JPEG in and out. Arrays are uint8 [height, width, 3], RGB."""

import io

import numpy as np
from PIL import Image


def resize_with_padding(image: np.ndarray, size: int) -> np.ndarray:
    """Scale to fit a ``size`` x ``size`` square, aspect kept, centred on black."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    # PIL widens its bilinear kernel when it shrinks, so fine patterns do not alias.
    scaled = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square = np.zeros((size, size, 3), dtype=np.uint8)
    square[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    return square


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """ValueError for anything that is not a whole JPEG."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    # PIL tells damage in all of these ways; a picture too large to be one of ours is damage too.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole JPEG ({error})") from None
