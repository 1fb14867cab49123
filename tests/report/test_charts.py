"""Pictures: what stands where, read back from the SVG."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from recap_ds.report import charts
from recap_ds.report.charts import Bars, Line, Look, histogram_chart, line_chart
from recap_ds.report.interval_chart import LEFT, RIGHT, WIDTH, Interval, interval_chart
from recap_ds.report.page_style import DARK, LIGHT
from recap_ds.report.svg import Scale, band_data, duration, number, path_data, round_ticks, short_number, value_range

EVIL = '<script>alert("x")</script>'


def parse(figure):
    """All elements by tag; an error where it is not well formed."""
    root = ElementTree.fromstring(figure)
    found = {}
    for element in root.iter():
        found.setdefault(element.tag, []).append(element)
    return found


def points_of(path):
    return np.array([[float(n) for n in pair.split(",")] for pair in re.findall(r"[ML]([-\d.]+,[-\d.]+)", path)])


def test_a_line_goes_through_its_values():
    steps, values = np.array([0, 50, 100]), np.array([0.0, 1.0, 0.5])
    drawn = parse(line_chart("Loss", [Line("training", steps, values)]))
    (line,) = [path for path in drawn["path"] if path.get("class") == "line"]
    points = points_of(line.get("d"))
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert points[:, 0].tolist() == [left, (left + right) / 2, right]
    rise = points[0, 1] - points[:, 1]  # downwards is positive in a picture
    assert rise[1] > 0 and rise[2] == pytest.approx(rise[1] / 2, abs=0.1)
    assert "from 0 at step 0 to 0.5 at 100, lowest 0, highest 1" in drawn["svg"][0].get("aria-label")
    assert drawn["svg"][0].get("role") == "img"
    assert [title.text for title in drawn["title"]] == ["training: 0 at 0", "training: 1 at 50", "training: 0.5 at 100"]


def test_lines_break_where_nothing_is_known_and_lone_points_show():
    assert path_data(np.arange(5.0), np.array([1.0, 2.0, np.nan, 4.0, np.nan])) == "M0.0,1.0L1.0,2.0M3.0,4.0h0.1"
    assert path_data(np.arange(2.0), np.full(2, np.nan)) == ""
    band = band_data(np.arange(4.0), np.array([0.0, 0.0, np.nan, 0.0]), np.array([1.0, 1.0, 1.0, 2.0]))
    assert band == "M0.0,1.0L1.0,1.0L1.0,0.0L0.0,0.0ZM3.0,2.0L3.0,0.0Z"


def test_a_logarithmic_axis_where_values_ask_for_one():
    x = np.arange(3)
    wide = line_chart("Loss", [Line("a", x, np.array([100.0, 1.0, 0.01]))], Look(log=True))
    points = points_of(next(p.get("d") for p in parse(wide)["path"] if p.get("class") == "line"))
    assert points[1, 1] - points[0, 1] == pytest.approx(points[2, 1] - points[1, 1], abs=0.11)
    assert "log scale" in wide
    for values in ([2.0, 1.0, 0.9], [100.0, 1.0, 0.0], [100.0, 1.0, -1.0]):
        assert "log scale" not in line_chart("Loss", [Line("a", x, np.array(values))], Look(log=True))


def test_a_long_line_has_an_envelope_and_stays_small():
    x = np.arange(50_000)
    y = np.where(x == 30_000, 1000.0, 1.0)
    figure = line_chart("Loss", [Line("a", x, y)])
    assert len(figure) < 12_000 and "highest 1,000" in figure
    (band,) = [path for path in parse(figure)["path"] if path.get("class") == "band"]
    assert points_of(band.get("d"))[:, 1].min() < charts.TOP + 15


@pytest.mark.parametrize("values", [[np.nan, np.nan], [np.inf, -np.inf], []])
def test_nothing_finite_says_so(values):
    figure = line_chart("Loss", [Line("a", np.arange(len(values)), np.array(values))])
    assert "No finite value" in figure and "<svg" not in figure
    assert line_chart("Loss", []) == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-300, 1e300], [-5e-324, 5e-324], [1e15, 1e15 + 1]])
def test_odd_ranges_are_drawn(values):
    line = Line("a", np.arange(len(values)), np.array(values))
    assert "nan" not in line_chart("x", [line], Look(reference=0.0, from_zero=True)).lower()
    assert "nan" not in line_chart("x", [line], Look(log=True)).lower()


def test_names_are_escaped_everywhere():
    line = Line(EVIL, np.arange(2), np.arange(2.0))
    parts = [
        line_chart(EVIL, [line], Look(x_name=EVIL, note=EVIL, reference=0.5, reference_name=EVIL)),
        histogram_chart(EVIL, Bars(0.0, 1.0, [1, 2]), 0.5, EVIL),
        interval_chart(EVIL, [Interval(EVIL, 0.5, 0.4, 0.6, note=EVIL, group=EVIL)], note=EVIL),
    ]
    for part in parts:
        assert "<script" not in part and parse(part)
    assert EVIL in parse(parts[0])["svg"][0].get("aria-label"), "and read back as it was"


def test_bars_have_the_height_of_their_counts():
    drawn = parse(histogram_chart("A", Bars(-1.0, 1.0, [10, 0, 30, 20]), 0.0, "threshold"))
    heights = [float(bar.get("height")) for bar in drawn["rect"]]
    assert len(heights) == 3 and heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    (mark,) = [path.get("d") for path in drawn["path"] if path.get("class") == "mark"]
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    assert mark.startswith(f"M{middle:.1f},")
    assert "60 samples from -1 to 1. threshold 0." in drawn["svg"][0].get("aria-label")


def test_a_threshold_beyond_all_samples_stays_in_the_picture():
    drawn = parse(histogram_chart("A", Bars(0.0, 1.0, [1, 1]), 3.0, "threshold"))
    (mark,) = [path.get("d") for path in drawn["path"] if path.get("class") == "mark"]
    assert mark.startswith(f"M{charts.WIDTH - charts.RIGHT:.1f},")


def test_intervals_stand_where_their_figures_are():
    rows = [
        Interval("imitation", 0.25, 0.0, 0.5, "5 of 20", group="button", points=(0.2, 0.3)),
        Interval("RECAP", 0.75, 0.5, 1.0, "15 of 20", color=1, group="button"),
        Interval("RECAP", 0.5, 0.25, 0.75, color=1, group="reach"),
    ]
    figure = interval_chart("Success", rows, high=1.0, reference=0.5)
    drawn = parse(figure)
    width = WIDTH - RIGHT - LEFT
    dots = [circle for circle in drawn["circle"] if circle.get("class") == "dot"]
    assert [(float(dot.get("cx")) - LEFT) / width for dot in dots] == pytest.approx([0.25, 0.75, 0.5], abs=1e-3)
    seeds = [circle for circle in drawn["circle"] if circle.get("class") == "seed"]
    assert [(float(seed.get("cx")) - LEFT) / width for seed in seeds] == pytest.approx([0.2, 0.3], abs=1e-3)
    heights = [float(dot.get("cy")) for dot in dots]
    assert heights[2] - heights[1] > heights[1] - heights[0], "a heading stands between two groups"
    assert figure.count('class="heading"') == 2
    assert "button, RECAP: 15 of 20 0.75, 95 % between 0.50 and 1.00." in drawn["svg"][0].get("aria-label")
    assert interval_chart("Success", []) == ""
    assert "nan" not in interval_chart("all zero", [Interval("a", 0.0, 0.0, 0.0)])


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.7, 12.2), (1e-7, 3e-7), (0.0, 2400.0), (99.0, 101.0)])
def test_ticks_are_round_and_inside(low, high):
    ticks = round_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 8 and ticks[0] >= low - 1e-12 and ticks[-1] <= high + 1e-9
    step = ticks[1] - ticks[0]
    assert re.fullmatch(r"(1|2|2\.5|5)e[+-]\d+", f"{step:.1e}".replace(".0e", "e"))


def test_numbers_as_people_read_them():
    assert [number(v) for v in (None, float("nan"), 0, 3.0, 0.123456, 12345.6, 1e-7, 1234567)] == [
        "-", "-", "0", "3", "0.1235", "12,346", "1.00e-07", "1,234,567",
    ]  # fmt: skip
    assert [short_number(v) for v in (0, 500, 1000, 20000, 1.5e6, -2500, 2e9)] == [
        "0", "500", "1k", "20k", "1.5M", "-2.5k", "2G",
    ]  # fmt: skip
    assert [duration(s) for s in (5, 600, 7500, 400_000)] == ["5 s", "10 min", "2 h 5 min", "4.6 days"]


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colors", [LIGHT, DARK])
def test_words_and_curves_stand_out_from_what_is_behind_them(colors):
    """WCAG 2.2, contrast: (lighter + 0.05) / (darker + 0.05)."""
    assert {f"c{number}" for number in range(charts.NUM_COLORS)} < colors.keys()
    for name in colors.keys() - {"page", "card", "edge", "grid"}:
        for behind in ("card", "page"):
            dark, bright = sorted(luminance(colors[each]) for each in (name, behind))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, behind)


def test_scales_keep_to_their_range():
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert scale.at(2.5) == 75.0 and scale.at(-5.0) == 100.0 and scale.at(50.0) == 0.0
    assert np.isnan(scale.place(np.array([np.nan]))[0])
    assert value_range([np.array([2.0, np.nan]), None], include=[0.0]) == (0.0, 2.0)
    assert value_range([np.array([np.nan])], include=[0.0]) is None
    assert value_range([np.array([4.0])]) == (2.0, 6.0)
