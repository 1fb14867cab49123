"""Which curves of ``metrics.jsonl`` are shown, together with which, under which heading.

Of one run a panel is one chart with its curves in it. Of several, every curve is a chart with the runs in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from recap_ds.report.charts import Line, Look, line_chart
from recap_ds.report.run_record import RunRecord
from recap_ds.sections import SOURCES

LOG = Look(log=True)
FROM_ZERO = Look(from_zero=True)


class Series(NamedTuple):
    label: str
    metric: str  # a whole name; ending in "/" all names that begin with it
    low: str | None = None  # the metrics that bound its band
    high: str | None = None


class Panel(NamedTuple):
    title: str
    series: tuple[Series, ...]
    look: Look = Look()


def _both(name: str) -> tuple[Series, Series]:
    return Series("training", f"train/{name}"), Series("held out", f"eval/{name}")


def _sources(name: str) -> tuple[Series, ...]:
    return tuple(Series(source, f"train/{source}/{name}") for source in SOURCES)


def _spread(name: str) -> tuple[Series]:
    return (Series("median", f"train/{name}/p50", f"train/{name}/p05", f"train/{name}/p95"),)


CHAPTERS: dict[str, tuple[Panel, ...]] = {
    "Losses": (
        Panel("Loss", _both("loss"), LOG),
        Panel("Policy loss", _both("policy_loss"), LOG),
        Panel("V loss", _both("v_loss"), LOG),
        Panel("Q loss", _both("q_loss"), LOG),
        Panel("Loss of action tokens", (Series("training", "train/action_token_loss"),), LOG),
        Panel("Action tokens predicted", (Series("share right", "train/action_token_accuracy"),), FROM_ZERO),
    ),
    "Held-out figures": (
        Panel(
            "Action error over that of the mean action",
            (
                Series("demo and human", "eval/action_error_ratio/demo_and_human"),
                Series("auto", "eval/action_error_ratio/auto"),
            ),
            Look(reference=1.0, reference_name="the task's mean action", from_zero=True),
        ),
        Panel("Rank correlation of V with the return", (Series("held out", "eval/value_rank_correlation"),)),
        Panel(
            "Error of V",
            (Series("held out", "eval/value_mae"), Series("training", "train/value_mae")),
            FROM_ZERO,
        ),
        Panel(
            "Success told from failure by V",
            (Series("held out", "eval/value_separation"),),
            Look(reference=0.5, reference_name="chance"),
        ),
        Panel(
            "V with another episode's pictures: how much worse",
            (Series("held out", "eval/value_shuffled_image_gap"),),
            Look(reference=0.0, reference_name="does not look"),
        ),
        Panel(
            "Conditioning gap",
            (Series("held out", "eval/conditioning_gap"),),
            Look(reference=0.0, reference_name="the indicator says nothing"),
        ),
    ),
    "By source": (
        Panel("Policy loss by source", _sources("policy_loss"), LOG),
        Panel("V loss by source", _sources("v_loss"), LOG),
        Panel("Q loss by source", _sources("q_loss"), LOG),
        Panel("Weight in the policy loss", _sources("policy_weight"), FROM_ZERO),
        Panel("Samples between two lines", _sources("samples"), FROM_ZERO),
        Panel("Epochs", (Series("", "data/epochs/"),), FROM_ZERO),
    ),
    "Values and advantages": (
        Panel("V", _spread("v"), Look(note="median, 5 to 95 %")),
        Panel("Q", _spread("q"), Look(note="median, 5 to 95 %")),
        Panel(
            "Advantage",
            _spread("advantage"),
            Look(note="median, 5 to 95 %", reference=0.0),
        ),
        Panel("Target critic's distance", (Series("mean of Q minus its target", "train/target_gap"),)),
        Panel("TD error", (Series("mean size", "train/td_error"),), LOG),
        Panel("Positive among not forced", (Series("", "train/positive_fraction/"),), FROM_ZERO),
        Panel("Forced positive", (Series("", "train/forced_fraction/"),), FROM_ZERO),
        Panel("Extraction weights at their limit", (Series("share", "train/weight_clip_fraction"),), FROM_ZERO),
    ),
    "Optimizer": (
        Panel("Learning rate", (Series("", "train/lr/"),), FROM_ZERO),
        Panel("Gradient norm", (Series("whole", "train/grad_norm"), Series("", "train/grad_norm/")), LOG),
        Panel(
            "Steps skipped",
            (Series("not finite", "train/skipped_steps"), Series("spikes", "train/spikes")),
            FROM_ZERO,
        ),
    ),
    "Speed and data": (
        Panel("Samples a second", (Series("all ranks", "time/samples_per_second"),), FROM_ZERO),
        Panel(
            "Seconds of a step",
            (
                Series("median", "time/step_p50_seconds"),
                Series("95 %", "time/step_p95_seconds"),
                Series("waiting for data", "time/data_wait_seconds"),
            ),
            FROM_ZERO,
        ),
        Panel("Use of the device's peak (MFU)", (Series("share", "train/mfu"),), FROM_ZERO),
        Panel("Peak memory, bytes", (Series("highest rank", "memory/peak_bytes"),), FROM_ZERO),
        Panel("Damaged samples replaced", (Series("so far", "data/replaced_total"),), FROM_ZERO),
    ),
}
# Of no interest while they are zero from the first line to the last.
QUIET = ("train/skipped_steps", "train/spikes", "train/weight_clip_fraction", "data/replaced_total")


MAX_LINES = 8  # of one chart: as many as there are colours


def chapter_charts(panels: Sequence[Panel], records: Sequence[RunRecord]) -> list[str]:
    """The charts of those panels of which any run has a curve."""
    if len(records) == 1:
        return [chart for panel in panels if (chart := _one_run(panel, records[0]))]
    return [chart for panel in panels for chart in _several_runs(panel, records)]


def _one_run(panel: Panel, record: RunRecord) -> str:
    found = [(each, _line(record, each, each.label)) for each in _expand(panel.series, [record])]
    lines = [line for _, line in found if line is not None]
    look = panel.look
    if len(lines) > MAX_LINES:
        look = look._replace(note=f"the first {MAX_LINES} of {len(lines)}")
    return line_chart(panel.title, [line._replace(color=i) for i, line in enumerate(lines[:MAX_LINES])], look)


def _several_runs(panel: Panel, records: Sequence[RunRecord]) -> list[str]:
    charts = []
    expanded = _expand(panel.series, records)[:MAX_LINES]
    for each in expanded:
        title = f"{panel.title}, {each.label}" if len(expanded) > 1 else panel.title
        found = [(color, _line(record, each, record.name)) for color, record in enumerate(records)]
        charts.append(line_chart(title, [line._replace(color=i) for i, line in found if line is not None], panel.look))
    return [chart for chart in charts if chart]


def _expand(series: Sequence[Series], records: Sequence[RunRecord]) -> list[Series]:
    """Prefixes become the names that there are, in any of the runs."""
    found: list[Series] = []
    for each in series:
        if each.metric.endswith("/"):
            names = dict.fromkeys(name for record in records for name in record.curves.under(each.metric))
            found += [Series(name, f"{each.metric}{name}") for name in names]
        elif any(record.curves.get(each.metric) is not None for record in records):
            found.append(each)
    return found


def _line(record: RunRecord, series: Series, name: str) -> Line | None:
    curve = record.curves.get(series.metric)
    if curve is None or (series.metric in QUIET and not curve.values.any()):
        return None
    low, high = (record.curves.get(bound) if bound else None for bound in (series.low, series.high))
    if low is None or high is None or not len(low.values) == len(high.values) == len(curve.values):
        return Line(name, curve.steps, curve.values)
    return Line(name, curve.steps, curve.values, low.values, high.values)
