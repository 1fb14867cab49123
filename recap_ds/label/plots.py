"""Just enough plotting for labels, with Pillow alone: small panels with lines, ticks, shades and histograms."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
WIDTH, HEIGHT = 420, 160
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 18, 22
TICK_PIXELS = 5
NUM_BARS = 60
BLACK, FRAME = (0, 0, 0), (190, 190, 190)


class Axes(NamedTuple):
    """Ranges of a panel; neither may be empty."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float


class Panel:
    """One small plot; points outside the axes are drawn on their edge, NaN breaks a line."""

    def __init__(self, title: str, axes: Axes):
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._axes = axes
        self._draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=FRAME)
        self._draw.text((LEFT, 3), title, fill=BLACK)
        self._draw.text((2, TOP - 4), _short(axes.y_high), fill=BLACK)
        self._draw.text((2, HEIGHT - BOTTOM - 8), _short(axes.y_low), fill=BLACK)
        self._draw.text((LEFT, HEIGHT - 12), _short(axes.x_low), fill=BLACK)
        right = _short(axes.x_high)
        self._draw.text((WIDTH - RIGHT - self._draw.textlength(right), HEIGHT - 12), right, fill=BLACK)

    def line(self, x: np.ndarray, y: np.ndarray, color: Color) -> None:
        points = [self._place(*point) for point in zip(x, np.nan_to_num(y), strict=True)]
        known = ~np.isnan(y)
        for i in range(len(points) - 1):
            if known[i] and known[i + 1]:
                self._draw.line((points[i], points[i + 1]), fill=color, width=2)

    def ticks(self, x: np.ndarray, color: Color) -> None:
        """Short marks under the axis."""
        for value in x:
            left, _ = self._place(float(value), 0.0)
            self._draw.line((left, HEIGHT - BOTTOM + 1, left, HEIGHT - BOTTOM + TICK_PIXELS), fill=color)

    def shade(self, x: float, color: Color) -> None:
        """From ``x`` half a unit to either side, over the whole height."""
        left, right = self._place(x - 0.5, 0.0)[0], self._place(x + 0.5, 0.0)[0]
        self._draw.rectangle((left, TOP + 1, right, HEIGHT - BOTTOM - 1), fill=color)

    def bar(self, low: float, high: float, top: float, color: Color) -> None:
        left, y = self._place(low, top)
        right = max(self._place(high, 0.0)[0] - 1, left)
        if y < HEIGHT - BOTTOM:
            self._draw.rectangle((left, y, right, HEIGHT - BOTTOM - 1), fill=color)

    def upright(self, x: float, color: Color) -> None:
        left, _ = self._place(x, 0.0)
        self._draw.line((left, TOP, left, HEIGHT - BOTTOM), fill=color)

    def _place(self, x: float, y: float) -> tuple[int, int]:
        axes = self._axes
        across = min(max((x - axes.x_low) / (axes.x_high - axes.x_low), 0.0), 1.0)
        up = min(max((y - axes.y_low) / (axes.y_high - axes.y_low), 0.0), 1.0)
        return (
            round(LEFT + across * (WIDTH - RIGHT - LEFT)),
            round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)),
        )


def histogram_panel(
    title: str, values: np.ndarray, low: float, high: float, threshold: float | None, color: Color, mark: Color
) -> Image.Image:
    """Counts of ``values`` in NUM_BARS bars over [low, high]; ``threshold`` is an upright line."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=NUM_BARS, range=(low, high))
    panel = Panel(title, Axes(low, high, 0.0, float(max(counts.max(), 1))))
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        panel.bar(left, right, count, color)
    if threshold is not None:
        panel.upright(threshold, mark)
    return panel.image


def stack_panels(panels: Sequence[Image.Image], num_columns: int) -> Image.Image:
    """Row by row on one sheet."""
    num_rows = max(-(-len(panels) // num_columns), 1)
    sheet = Image.new("RGB", (num_columns * WIDTH, num_rows * HEIGHT), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % num_columns * WIDTH, i // num_columns * HEIGHT))
    return sheet


def _short(value: float) -> str:
    return f"{value:.3g}"
