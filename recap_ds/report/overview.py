"""The first part of the page: the verdict on every run, and the figures people compare runs by."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.report.configuration import learning_keys, show
from recap_ds.report.findings import Finding, findings_of, gate_of, headline
from recap_ds.report.next_steps import next_steps
from recap_ds.report.page import Cell, Html, table
from recap_ds.report.run_record import RunRecord
from recap_ds.report.state import State, state_of
from recap_ds.report.svg import escape, number, rough

MAX_NAMED_KEYS = 4
SIGNS = {"good": "good", "warn": "look", "bad": "bad", "note": "note"}


class Judged(NamedTuple):
    """A run with what there is to say of it."""

    record: RunRecord
    state: State
    findings: list[Finding]

    @property
    def line(self) -> str:
        """The verdict as one line of text."""
        return f"{self.record.name}: {headline(self.state, self.findings)[1]}. {self.state.text}"


def judge(record: RunRecord, now: float) -> Judged:
    state = state_of(record, now)
    return Judged(record, state, findings_of(record, state))


def verdict_card(judged: Judged, first: Judged | None) -> str:
    """``first``: what the run is compared with, which may be itself; None where it stands alone."""
    record, state, findings = judged
    level, told = headline(state, findings)
    name = f"<h3>{escape(record.name)}</h3>" if first is not None else ""
    change = bar = ""
    if first is not None and first is not judged:
        change = f"<p>{escape(what_changed(record, first.record))}</p>"
    if state.fraction is not None:
        percent = f"{100 * state.fraction:.0f}"
        bar = (
            f'<div class="progress" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" '
            f'aria-valuemax="100" aria-label="share of all steps"><div style="width:{percent}%"></div></div>'
        )
    items = "".join(map(_finding, findings))
    steps = "".join(f"<li><code>{escape(step)}</code></li>" for step in next_steps(record, state))
    return (
        f'<div class="card">{name}<p class="verdict {_class(level)}">{escape(told)}</p>{bar}'
        f"<p>{escape(state.text)}</p>{change}"
        f'<ul class="findings">{items}</ul><p><b>Next</b></p><ul class="next">{steps}</ul></div>'
    )


def findings_card(findings: Sequence[Finding]) -> str:
    """Of what belongs to no run; '' where there is nothing."""
    items = "".join(map(_finding, findings))
    return f'<div class="card"><ul class="findings">{items}</ul></div>' if items else ""


def what_changed(record: RunRecord, first: RunRecord) -> str:
    """In a sentence: the settings that matter and what came of it, by the first run's gate."""
    keys = learning_keys(record, first)
    named = ", ".join(
        f"{key} {show(first.setting(key))} -> {show(record.setting(key))}" for key in keys[:MAX_NAMED_KEYS]
    )
    more = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
    told = f"Against {first.name}: {named or 'no setting that changes what is learned'}{more}."
    metric = gate_of(first).metric
    mine, other = (each.curves.get(metric) for each in (record, first))
    if mine is None or other is None or mine.last is None or other.last is None:
        return told
    return f"{told} {metric} is {rough(mine.last)} in place of {rough(other.last)}."


def _finding(finding: Finding) -> str:
    mend = f'<span class="mend">{escape(finding.mend)}</span>' if finding.mend else ""
    return f'<li><b class="{_class(finding.level)}">{SIGNS[finding.level]}</b>{escape(finding.text)}{mend}</li>'


def _class(level: str) -> str:
    return "note-level" if level == "note" else level


class KeyFigure(NamedTuple):
    name: str
    metric: str
    better: Callable[[Sequence[float]], float]  # min or max


KEY_FIGURES = (
    KeyFigure("held-out loss", "eval/loss", min),
    KeyFigure("held-out policy loss", "eval/policy_loss", min),
    KeyFigure("action error over the mean action's, demo and human", "eval/action_error_ratio/demo_and_human", min),
    KeyFigure("conditioning gap", "eval/conditioning_gap", max),
    KeyFigure("rank correlation of V", "eval/value_rank_correlation", max),
    KeyFigure("error of V", "eval/value_mae", min),
    KeyFigure("separation by V", "eval/value_separation", max),
    KeyFigure("shuffled-image gap of V", "eval/value_shuffled_image_gap", max),
    KeyFigure("training loss", "train/loss", min),
)
SPEED = "time/samples_per_second"


def key_figures(judged: Sequence[Judged]) -> Html:
    """Of one run first, best and last; of several the last of each, the best of them marked."""
    records = [each.record for each in judged]
    return _of_one_run(records[0]) if len(records) == 1 else _of_several(records)


def _of_one_run(record: RunRecord) -> Html:
    rows = []
    for figure in KEY_FIGURES:
        curve = record.curves.get(figure.metric)
        known = np.isfinite(curve.values) if curve is not None else np.empty(0, bool)
        if curve is None or not known.any():
            continue
        values, steps = curve.values[known], curve.steps[known]
        best = int(values.argmin() if figure.better is min else values.argmax())
        shown = [number(float(value)) for value in (values[-1], values[best], values[0])]
        rows.append((figure.name, shown[0], shown[1], f"{steps[best]:,}", shown[2]))
    return table("Figures that runs are judged by", ("", "last", "best", "at step", "first"), rows)


def _of_several(records: Sequence[RunRecord]) -> Html:
    rows: list[list[str | Cell]] = []
    steps = [record.curves.last_step for record in records]
    rows.append(["last step", *(number(step) for step in steps)])
    for figure in KEY_FIGURES:
        curves = [record.curves.get(figure.metric) for record in records]
        last = [None if curve is None else curve.last for curve in curves]
        known = [value for value in last if value is not None]
        if not known:
            continue
        best = number(figure.better(known)) if len(known) > 1 else None  # those that read the same are the same
        rows.append([figure.name, *(Cell(number(value), number(value) == best) for value in last)])
    speeds = [_median(record, SPEED) for record in records]
    if any(speed is not None for speed in speeds):
        rows.append(["samples a second, median", *(number(speed) for speed in speeds)])
    header = ("", *(record.name for record in records))
    return table("The last figures of each run, the best ones bold", header, rows)


def _median(record: RunRecord, metric: str) -> float | None:
    curve = record.curves.get(metric)
    if curve is None or not np.isfinite(curve.values).any():
        return None
    return float(np.nanmedian(curve.values))
