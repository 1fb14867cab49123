"""metrics.jsonl as a run leaves it: growing, cut off, damaged, started again; and long curves in few points."""

import json

import numpy as np
import pytest

from recap_ds.report.curves import read_curves
from recap_ds.report.envelope import envelope


def write(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_curves_are_the_figures_by_step(tmp_path):
    lines = [{"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": None}, {"step": 20, "eval/loss": 3.0}]
    curves = read_curves(write(tmp_path, "".join(f"{json.dumps(line)}\n" for line in lines)))
    loss = curves.by_name["train/loss"]
    assert loss.steps.tolist() == [10, 20] and loss.values[0] == 2.0 and np.isnan(loss.values[1]), "null is not known"
    assert loss.last == 2.0 and curves.by_name["eval/loss"].steps.tolist() == [20]
    assert (curves.num_lines, curves.num_damaged, curves.last_step) == (3, 0, 20)
    assert list(curves.under("train/")) == ["loss"] and curves.get("train/none") is None


@pytest.mark.parametrize("tail", ['{"step": 30, "train/lo', '{"step": 30, "train/loss": 1.0}'])
def test_a_line_without_its_end_is_still_being_written(tmp_path, tail):
    curves = read_curves(write(tmp_path, '{"step": 20, "train/loss": 2.0}\n' + tail))
    assert curves.last_step == 20 and curves.num_damaged == 0


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    bad = [b"\xff\xfe{", b"[1, 2]", b'{"train/loss": 1.0}', b'{"step": "x"}', b'{"step": 5, "a": "word"}', b"", b"7"]
    bad.append(b'{"step": 1e400, "train/loss": 1.0}')
    text = b"".join(line + b"\n" for line in [*bad, b'{"step": 20, "train/loss": 2.0}'])
    curves = read_curves(write(tmp_path, text))
    assert (curves.num_lines, curves.num_damaged) == (1, len(bad))
    assert curves.by_name["train/loss"].values.tolist() == [2.0]


def test_of_steps_taken_twice_the_later_line_counts(tmp_path):
    steps = [(10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0), (30, 6.0), (40, 7.0)]
    curves = read_curves(write(tmp_path, "".join(f'{{"step": {s}, "x": {v}}}\n' for s, v in steps)))
    assert curves.by_name["x"].steps.tolist() == [10, 20, 30, 40]
    assert curves.by_name["x"].values.tolist() == [1.0, 5.0, 6.0, 7.0]


def test_an_empty_file_has_no_curves(tmp_path):
    assert read_curves(write(tmp_path, "")).last_step is None


def test_a_short_curve_keeps_every_point():
    x, y = np.arange(5), np.array([1.0, np.inf, 3.0, np.nan, 5.0])
    few = envelope(x, y)
    assert few.low is None and few.x.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(few.middle, [1.0, np.nan, 3.0, np.nan, 5.0])


def test_no_peak_of_a_long_curve_is_lost():
    x = np.arange(100_000)
    y = np.sin(x / 3000.0)
    y[54_321], y[70_000] = 40.0, np.nan
    few = envelope(x, y, num_buckets=100)
    assert len(few.x) == 100 and np.nanmax(few.high) == 40.0 and np.argmax(few.high) == 54
    # 1,000 points a bucket: the mean of a sine over it, in closed form up to the sampling of the integral.
    edges = np.arange(101) * 1000.0
    expected = 3.0 * (np.cos(edges[:-1] / 3000.0) - np.cos(edges[1:] / 3000.0))
    clean = np.delete(np.arange(100), [54])
    np.testing.assert_allclose(few.middle[clean], expected[clean], atol=1e-3)
    assert (few.low <= few.middle).all() and (few.middle <= few.high).all()


def test_a_bucket_of_nothing_known_is_a_gap():
    y = np.ones(1000)
    y[500:600] = np.nan
    few = envelope(np.arange(1000), y, num_buckets=10)
    assert np.isnan(few.middle[5]) and np.isnan(few.low[5]) and (np.delete(few.middle, 5) == 1.0).all()
