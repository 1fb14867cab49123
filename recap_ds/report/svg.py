"""Text for pages and pictures: escaping, numbers as people read them, scales with round ticks.

Everything that comes from a file or a folder's name passes through ``escape`` on its way into a page.
"""

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

MAX_NAME_LENGTH = 46
TINY = 1e-200  # a range below this is none


def escape(text: object) -> str:
    """Safe as content and inside quotes."""
    return html.escape(printable(str(text)), quote=True)


def printable(text: str) -> str:
    """Names of files may hold bytes that are no text, which nothing can print: '?' stands for them."""
    return text.encode("utf-8", "replace").decode()


def shorten(text: str, length: int = MAX_NAME_LENGTH) -> str:
    """What fits beside a bar; the whole text belongs into a title."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def number(value: float | None) -> str:
    """Four digits that count; '-' where there is no number."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def rough(value: float) -> str:
    """Three digits, for sentences."""
    return number(float(f"{value:.3g}"))


def short_number(value: float) -> str:
    """For ticks: 20000 -> 20k."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 1.0001 or abs(value) == unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:.1f} days"


class Scale(NamedTuple):
    """A range of values onto a range of the picture; ``start`` may be larger than ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Outside of the range: on its edge. NaN stays."""
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(np.maximum(values, low)), math.log10(low), math.log10(high)
        return self.start + np.clip((values - low) / (high - low), 0.0, 1.0) * (self.end - self.start)

    def at(self, value: float) -> float:
        return float(self.place(np.array([value], np.float64))[0])

    def ticks(self, count: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high, count)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers within [low, high]."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between them where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(decades) // 6)
    factors = (1.0, 2.0, 5.0) if math.log10(high / low) < 2.5 else (1.0,)
    ticks = [factor * 10.0**decade for decade in decades[::stride] for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def value_range(parts: Iterable[np.ndarray | None], include: Iterable[float] = ()) -> tuple[float, float] | None:
    """Lowest and highest finite value, never the same; None where there is none."""
    finite = [part[np.isfinite(part)] for part in parts if part is not None]
    known = [*include, *(float(edge) for part in finite if len(part) for edge in (part.min(), part.max()))]
    if not any(len(part) for part in finite):
        return None
    low, high = min(known), max(known)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), TINY):
        spread = 0.5 * abs(low) if abs(low) > TINY else 0.5
        return low - spread, high + spread
    return low, high


def path_data(x: np.ndarray, y: np.ndarray) -> str:
    """Through the points [n], [n]; NaN breaks the line, and a point between two breaks becomes a dot."""
    known = np.isfinite(x) & np.isfinite(y)
    words = []
    for i in np.flatnonzero(known):
        word = "L" if i > 0 and known[i - 1] else "M"
        words.append(f"{word}{x[i]:.1f},{y[i]:.1f}")
        if word == "M" and (i + 1 == len(x) or not known[i + 1]):
            words.append("h0.1")
    return "".join(words)


def band_data(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """The area between two lines [n]; NaN makes a gap."""
    known = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
    words = []
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        there = [f"{a:.1f},{b:.1f}" for a, b in zip(x[first:end], high[first:end], strict=True)]
        back = [f"{a:.1f},{b:.1f}" for a, b in zip(x[first:end][::-1], low[first:end][::-1], strict=True)]
        words.append(f"M{'L'.join(there + back)}Z")
    return "".join(words)
