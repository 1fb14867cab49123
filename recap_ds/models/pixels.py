"""Images on the device: uint8 -> [-1, 1], with optional augmentation from the batch's own random draws.

B batch   C cameras   P image side
"""

import torch
from torch import Tensor

MAX_SHIFT = 1 / 16  # of the image side
MAX_BRIGHTNESS, MAX_CONTRAST, MAX_SATURATION = 0.2, 0.3, 0.3


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, C, 3, P, P] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def training_pixels(images: Tensor, draws: Tensor, augmented: bool) -> Tensor:
    """``to_pixels`` of a training batch's images, augmented by its ``draws`` where the run asks for that."""
    pixels = to_pixels(images)
    return augment(pixels, draws) if augmented else pixels


def augment(pixels: Tensor, draws: Tensor) -> Tensor:
    """Shift and recolour; ``draws`` [B, 5] uniform in [0, 1), shared by a sample's cameras."""
    shift_y, shift_x, brightness, contrast, saturation = (2.0 * draws - 1.0).unbind(dim=1)
    pixels = _shift(pixels, shift_y, shift_x)

    def per_sample(amount: Tensor, largest: float) -> Tensor:
        return (amount * largest)[:, None, None, None, None]

    grey = pixels.mean(dim=2, keepdim=True)
    pixels = grey + (pixels - grey) * (1.0 + per_sample(saturation, MAX_SATURATION))
    mean = pixels.mean(dim=(2, 3, 4), keepdim=True)
    pixels = mean + (pixels - mean) * (1.0 + per_sample(contrast, MAX_CONTRAST))
    return (pixels + per_sample(brightness, MAX_BRIGHTNESS)).clamp(-1.0, 1.0)


def _shift(pixels: Tensor, shift_y: Tensor, shift_x: Tensor) -> Tensor:
    """Whole-pixel translation per sample, edges replicated."""
    _, cameras, _, side, _ = pixels.shape
    order = torch.arange(side, device=pixels.device)

    def source(shift: Tensor) -> Tensor:  # [B, P]
        return (order + (shift[:, None] * MAX_SHIFT * side).round().long()).clamp(0, side - 1)

    rows = source(shift_y)[:, None, None, :, None].expand(-1, cameras, 3, -1, side)
    columns = source(shift_x)[:, None, None, None, :].expand(-1, cameras, 3, side, -1)
    return pixels.gather(3, rows).gather(4, columns)
