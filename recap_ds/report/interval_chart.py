"""Rates with their intervals as bars and whiskers: ways to act, checkpoints, or the arms of a study over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from recap_ds.report.charts import NUM_COLORS, figure, svg
from recap_ds.report.svg import Scale, escape, short_number, shorten

WIDTH = 360
LEFT, RIGHT, TOP = 8, 12, 6
ROW, HEADING = 36, 22
AXIS = 24


class Interval(NamedTuple):
    """One row: a figure and between what it lies, all in one unit."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""  # what it was counted on, say "5 of 10"
    color: int = 0
    group: str = ""  # rows of one group stand under its name, in the order given
    points: tuple[float, ...] = ()  # what the figure was made of, such as one per seed


def interval_chart(
    title: str, rows: Sequence[Interval], *, high: float | None = None, reference: float | None = None, note: str = ""
) -> str:
    """A figure; '' where there are no rows. ``high``: the end of the axis, such as 1 for a rate; it begins at 0."""
    if not rows:
        return ""
    edges = [edge for row in rows for edge in (row.low, row.value, row.high, *row.points)]
    lowest, highest = min(0.0, *edges), high if high is not None else max(*edges, 1e-9) * 1.05
    x = Scale(lowest, highest, LEFT, WIDTH - RIGHT)
    parts, top, group, words = [], float(TOP), "", []
    for row in rows:
        if row.group != group:
            group = row.group
            parts.append(f'<text class="heading" x="{LEFT}" y="{top + 15:g}">{escape(shorten(group))}</text>')
            top += HEADING
        parts.append(_row(row, x, top))
        words.append(f"{f'{group}, ' if group else ''}{row.name}: {row.note} {_in_words(row)}.")
        top += ROW
    for tick in x.ticks(5):
        across = x.at(tick)
        anchor = "start" if across < LEFT + 6 else "end" if across > WIDTH - RIGHT - 6 else "middle"
        parts.insert(0, f'<path class="grid" d="M{across:.1f},{TOP}V{top:g}"/>')
        parts.append(f'<text x="{across:.1f}" y="{top + 15:g}" text-anchor="{anchor}">{short_number(tick)}</text>')
    if reference is not None:
        parts.append(f'<path class="mark" d="M{x.at(reference):.1f},{TOP}V{top:g}"/>')
    return figure(title, svg(f"{title}. {' '.join(words)}", parts, top + AXIS), "", note)


def _row(row: Interval, x: Scale, top: float) -> str:
    label, line = top + 12, top + 23
    low, value, high = x.at(row.low), x.at(row.value), x.at(row.high)
    says = f"{row.name}: {row.note} {_in_words(row)}"
    ending = f"{_told(row.value)} [{_told(row.low)}, {_told(row.high)}]"
    room = max(12, 50 - len(ending) - len(row.note))
    note = f" <tspan class='note'>{escape(row.note)}</tspan>" if row.note else ""
    dots = "".join(f'<circle class="seed" cx="{x.at(point):.1f}" cy="{line:g}" r="2"/>' for point in row.points)
    return (
        f'<g class="c{row.color % NUM_COLORS}"><title>{escape(says)}</title>'
        f'<text x="{LEFT}" y="{label:g}">{escape(shorten(row.name, room))}{note}</text>'
        f'<text class="figure" x="{WIDTH - RIGHT}" y="{label:g}" text-anchor="end">{ending}</text>'
        f'<rect class="bar" x="{x.at(0.0):.1f}" y="{line - 5:g}" width="{max(value - x.at(0.0), 0):.1f}" height="10"/>'
        f'<path class="whisker" d="M{low:.1f},{line - 5:g}v10m0,-5H{high:.1f}m0,-5v10"/>'
        f'{dots}<circle class="dot" cx="{value:.1f}" cy="{line:g}" r="4"/></g>'
    )


def _in_words(row: Interval) -> str:
    return f"{_told(row.value)}, 95 % between {_told(row.low)} and {_told(row.high)}"


def _told(value: float) -> str:
    """No more digits than an interval of some dozen episodes deserves."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"
