"""Curves and histograms as inline SVG: no script, no dependency. Colours are the page's, by number (``page_style.py``).

A picture says in its label what it shows, in words; hovering a point or a bar gives its numbers.

    n points of a line
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.report.envelope import drawable, envelope
from recap_ds.report.svg import Scale, band_data, escape, number, path_data, short_number, value_range

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 34
NUM_COLORS = 8
# A curve of positive values that spans more than this is drawn on a logarithmic axis, where the caller allows it.
LOG_RATIO = 30.0
MAX_MARKED_POINTS = 40


class Line(NamedTuple):
    name: str
    x: np.ndarray  # [n] rising
    y: np.ndarray  # [n], NaN = not known
    low: np.ndarray | None = None  # [n] a band around the line
    high: np.ndarray | None = None
    color: int = 0


class Look(NamedTuple):
    """What a chart of lines may be told beside its lines."""

    x_name: str = "step"
    log: bool = False  # True = logarithmic where the values ask for it
    reference: float | None = None  # a horizontal line
    reference_name: str = ""
    diagonal: bool = False  # y = x
    from_zero: bool = False
    note: str = ""
    shows_last: bool = True  # the last value of each line stands in the legend


PLAIN = Look()


def line_chart(title: str, lines: Sequence[Line], look: Look = PLAIN) -> str:
    """A figure; '' where there is no line at all."""
    if not lines:
        return ""
    drawn = [envelope(line.x, line.y) for line in lines]
    bands = [drawable(edge) for line in lines for edge in (line.low, line.high) if edge is not None]
    x_range = value_range([each.x for each in drawn])
    values = [*bands, *(part for each in drawn for part in each[1:])]
    include = [0.0] if look.from_zero else []
    include += [look.reference] if look.reference is not None else []
    y_range = value_range(values, include)
    if x_range is None or y_range is None:
        return figure(title, '<p class="empty">No finite value was written.</p>', "")
    log = look.log and _wants_log(y_range)
    x = Scale(*x_range, LEFT, WIDTH - RIGHT)
    y = Scale(*(y_range if log else _padded(y_range, look.from_zero)), HEIGHT - BOTTOM, TOP, log)
    if look.diagonal:
        both = _padded((min(x_range[0], y_range[0]), max(x_range[1], y_range[1])), False)
        x, y = x._replace(low=both[0], high=both[1]), y._replace(low=both[0], high=both[1])
    parts = [axes(x, y, look.x_name)]
    parts += [_reference(x, y, look)]
    parts += [_draw(line, x, y) for line in lines]
    text = f"{title}. {'Logarithmic. ' if log else ''}{' '.join(describe(line, look.x_name) for line in lines)}"
    note = ", ".join(part for part in ("log scale" if log else "", look.note) if part)
    return figure(title, svg(text, parts, HEIGHT), legend(lines, look.shows_last), note)


def _draw(line: Line, x: Scale, y: Scale) -> str:
    few = envelope(line.x, line.y)
    across, parts = x.place(few.x), []
    low, high = few.low, few.high
    if line.low is not None and line.high is not None:  # a band of its own says more than that of the buckets
        across_band = envelope(line.x, line.low)
        low, high = across_band.middle, envelope(line.x, line.high).middle
    if low is not None and high is not None:
        parts.append(f'<path class="band" d="{band_data(across, y.place(low), y.place(high))}"/>')
    parts.append(f'<path class="line" d="{path_data(across, y.place(few.middle))}"/>')
    if len(few.x) <= MAX_MARKED_POINTS:
        parts += [_mark(line.name, *point, x, y) for point in zip(few.x, few.middle, strict=True)]
    return f'<g class="c{line.color % NUM_COLORS}">{"".join(parts)}</g>'


def _mark(name: str, across: float, up: float, x: Scale, y: Scale) -> str:
    if not np.isfinite(up):
        return ""
    title = escape(f"{name}: {number(float(up))} at {number(float(across))}")
    return f'<circle cx="{x.at(across):.1f}" cy="{y.at(up):.1f}" r="2.4"><title>{title}</title></circle>'


def _reference(x: Scale, y: Scale, look: Look) -> str:
    if look.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        ends = np.array([low, high])
        return f'<path class="reference" d="{path_data(x.place(ends), y.place(ends))}"/>'
    if look.reference is None:
        return ""
    up = y.at(look.reference)
    text = f'<text x="{WIDTH - RIGHT - 2}" y="{up - 4:.1f}" text-anchor="end">{escape(look.reference_name)}</text>'
    return f'<path class="reference" d="M{LEFT},{up:.1f}H{WIDTH - RIGHT}"/>{text}'


class Bars(NamedTuple):
    """A histogram: counts of equal bars over [low, high]."""

    low: float
    high: float
    counts: Sequence[int]


def histogram_chart(title: str, bars: Bars, mark: float | None = None, mark_name: str = "", color: int = 0) -> str:
    """``mark``: an upright line, such as a threshold; to its right is what lies above it."""
    x = Scale(bars.low, bars.high, LEFT, WIDTH - RIGHT)
    if mark is not None:  # never outside of its own picture
        x = x._replace(low=min(x.low, mark), high=max(x.high, mark))
    height = 150
    y = Scale(0.0, float(max(max(bars.counts, default=0), 1)), height - BOTTOM, TOP)
    edges = np.linspace(bars.low, bars.high, len(bars.counts) + 1)
    parts = [axes(x, y, "", height)]
    for count, left, right in zip(bars.counts, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            top, begin = y.at(count), x.at(left)
            shape = f'x="{begin:.1f}" y="{top:.1f}" width="{max(x.at(right) - begin - 0.6, 0.8):.1f}"'
            says = f"<title>{number(left)} to {number(right)}: {count:,}</title>"
            parts.append(f'<rect class="bar c{color}" {shape} height="{height - BOTTOM - top:.1f}">{says}</rect>')
    words = f"{title}: {sum(bars.counts):,} samples from {number(bars.low)} to {number(bars.high)}."
    note = ""
    if mark is not None:
        note = f"{mark_name} {number(mark)}"
        words += f" {note}."
        parts.append(f'<path class="mark" d="M{x.at(mark):.1f},{TOP}V{height - BOTTOM}"/>')
    return figure(title, svg(words, parts, height), "", note)


def axes(x: Scale, y: Scale, x_name: str, height: int = HEIGHT) -> str:
    """Grid lines, numbers and the horizontal axis's name."""
    floor, parts = height - BOTTOM, []
    for tick in y.ticks(4):
        up = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{up:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{up + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in x.ticks(5):
        across = x.at(tick)
        anchor = "end" if across > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<path class="tick" d="M{across:.1f},{floor}v4"/>')
        parts.append(f'<text x="{across:.1f}" y="{floor + 16}" text-anchor="{anchor}">{short_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{floor}H{WIDTH - RIGHT}"/>')
    if x_name:
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_name)}</text>')
    return "".join(parts)


def svg(text: str, parts: Sequence[str], height: float, width: int = WIDTH) -> str:
    """``text`` is what somebody is told who does not see it."""
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(text)}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )


def figure(title: str, picture: str, below: str, note: str = "") -> str:
    small = f' <span class="note">{escape(note)}</span>' if note else ""
    return f'<figure class="chart"><figcaption>{escape(title)}{small}</figcaption>{picture}{below}</figure>'


def legend(lines: Sequence[Line], shows_last: bool) -> str:
    """The lines by colour, with the last value of each where that means something."""
    items = []
    for line in lines:
        last = f" <b>{number(_last_known(line.y))}</b>" if shows_last else ""
        key = f'<svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{line.color % NUM_COLORS}" d="M1,4H21"/>'
        items.append(f"<li>{key}</svg>{escape(line.name)}{last}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def describe(line: Line, x_name: str) -> str:
    """A line in words."""
    known = np.flatnonzero(np.isfinite(line.y))
    if not len(known):
        return f"{line.name}: no finite value."
    first, last = known[0], known[-1]
    lowest, highest = line.y[known].min(), line.y[known].max()
    return (
        f"{line.name}: from {number(float(line.y[first]))} at {x_name} {number(float(line.x[first]))} to "
        f"{number(float(line.y[last]))} at {number(float(line.x[last]))}, "
        f"lowest {number(float(lowest))}, highest {number(float(highest))}."
    )


def _last_known(y: np.ndarray) -> float | None:
    known = y[np.isfinite(y)]
    return float(known[-1]) if len(known) else None


def _wants_log(y_range: tuple[float, float]) -> bool:
    return y_range[0] > 0 and y_range[1] / y_range[0] > LOG_RATIO


def _padded(y_range: tuple[float, float], from_zero: bool) -> tuple[float, float]:
    low, high = y_range
    room = 0.05 * (high - low)
    return (low if from_zero and low == 0.0 else low - room), high + room
