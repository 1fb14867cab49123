"""Pictures: square resizing, JPEG in and out. Arrays are uint8 [height, width, 3], RGB.

Whatever decodes a stored picture (training, evaluation, labels) does it here, so that all see the same pixels.
simplejpeg and PIL both hold libjpeg-turbo and give the same ones to the bit; simplejpeg takes about half the time.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

# Stored pictures are far smaller; a damaged or hostile header may ask for gigabytes.
MAX_PICTURE_PIXELS = 2**26


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
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if width * height > MAX_PICTURE_PIXELS:
            raise ValueError(f"{width}x{height} pixels are too many")
        # Its own defaults, written out because the pixels depend on them: exact DCT, smooth upsampling of colour.
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        raise ValueError(f"not a whole JPEG ({error})") from None
