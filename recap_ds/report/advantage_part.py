"""Labels and thresholds on the page."""

from collections.abc import Sequence

from recap_ds.report.advantages import LabelView, RingView
from recap_ds.report.charts import histogram_chart
from recap_ds.report.evaluation_part import calibration_chart
from recap_ds.report.page import grid, paragraph, table
from recap_ds.report.svg import escape, number

MAX_TASKS = 24  # whose pictures are drawn; tables have all


def label_part(view: LabelView) -> str:
    header = ("task", "samples", "forced", "ranked", "positive", "share", "threshold", "sigma", "unknown")
    rows = [
        (
            name,
            *(f"{count:,}" for count in (task.num_samples, task.num_forced, task.num_known, task.num_positive)),
            *(number(figure) for figure in (task.positive_fraction, task.threshold, task.sigma)),
            f"{task.num_samples - task.num_forced - task.num_known:,}",
        )
        for name, task in view.tasks.items()
    ]
    shares = [(g.source, g.outcome, f"{g.num_samples:,}", f"{g.positive_share:.1%}") for g in view.groups]
    charts = [
        histogram_chart(f"Advantage: {task}, {source}", bars, view.tasks[task].threshold, "threshold", color)
        for task, sources in list(view.histograms.items())[:MAX_TASKS]
        for color, (source, bars) in enumerate(sources.items())
    ]
    charts += [
        calibration_chart(f"Values as labelled: {task}", groups)
        for task, groups in list(view.calibration.items())[:MAX_TASKS]
    ]
    problem = paragraph(f"The labels of single samples cannot be shown: {view.problem}") if view.problem else ""
    return (
        f"<h3>labels '{escape(view.tag)}'</h3>{paragraph(str(view.folder))}{paragraph(view.made_of)}{problem}"
        f"{table('Thresholds and shares', header, rows)}"
        f"{table('Who is positive', ('source', 'outcome', 'samples', 'positive'), shares)}{grid(charts)}"
    )


def ring_part(name: str, rings: Sequence[RingView]) -> str:
    """What a joint run's indicator goes by."""
    if not rings:
        return ""
    charts = [
        histogram_chart(f"Advantage: {ring.task}", ring.bars, ring.threshold, "threshold") for ring in rings[:MAX_TASKS]
    ]
    header = ("task", "advantages held", "threshold", "sigma")
    rows = [(ring.task, f"{ring.num_held:,}", number(ring.threshold), number(ring.sigma)) for ring in rings]
    told = "The last advantages of samples that are not forced positive, at the latest checkpoint; positive is above."
    return f"<h3>{escape(name)}</h3>{paragraph(told)}{table('Thresholds', header, rows)}{grid(charts)}"
