"""Charts of a page as a file of their own: an SVG that brings its style, for a README."""

import re
from collections.abc import Mapping

from recap_ds.report.page_style import style_sheet
from recap_ds.report.svg import escape

TITLE_HEIGHT, GAP = 26, 24


def side_by_side(charts: Mapping[str, str]) -> str:
    """``charts``: title -> figure, from left to right."""
    parts, left, height = [], 0.0, 0.0
    for title, chart in charts.items():
        drawing = chart[chart.index("<svg") : chart.rindex("</svg>") + len("</svg>")]
        size = re.match(r'<svg viewBox="0 0 (\S+) (\S+)"', drawing)
        assert size, "a chart's drawing begins with its size"
        width, tall = (float(number) for number in size.groups())
        place = f'<svg x="{left:g}" y="{TITLE_HEIGHT}" width="{width:g}" height="{tall:g}"'
        parts += [
            f'<text class="heading" x="{left + 8:g}" y="18">{escape(title)}</text>',
            place + drawing[len("<svg") :],
        ]
        left, height = left + width + GAP, max(height, tall + TITLE_HEIGHT)
    return (
        f'<svg viewBox="0 0 {left - GAP:g} {height:g}" xmlns="http://www.w3.org/2000/svg"><style>{style_sheet()}</style>'
        f'<rect width="100%" height="100%" style="fill:var(--card)"/>{"".join(parts)}</svg>\n'
    )
