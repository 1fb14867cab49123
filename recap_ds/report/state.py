"""Where a run stands: done, running, failed, stopped or not begun, as far as its folder can tell."""

from datetime import datetime, timezone
from typing import Literal, NamedTuple

import numpy as np

from recap_ds.report.run_record import Failure, RunRecord
from recap_ds.report.svg import duration

# A run whose last line of metrics is older than so many of its usual intervals, and than MIN_QUIET_SECONDS, runs no
# more: a step may take long, and saves and evaluations lie between two lines.
QUIET_INTERVALS = 6.0
MIN_QUIET_SECONDS = 300.0

Kind = Literal["done", "running", "failed", "stopped", "empty"]


class State(NamedTuple):
    kind: Kind
    text: str  # one sentence
    fraction: float | None  # of all steps, where that is known


def state_of(record: RunRecord, now: float) -> State:
    """``now``: seconds since the epoch."""
    step, total = record.curves.last_step, record.total_steps
    fraction = min(step / total, 1.0) if step is not None and total else None
    place = _place(step, total)
    if record.summary is not None:
        if record.summary.get("stopped_early"):
            return State("done", f"Finished {place}: evaluation.gate had stopped improving.", fraction)
        return State("done", f"Finished {place}.", fraction)
    if failure := last_failure(record):
        when = f"{datetime.fromtimestamp(failure.time, timezone.utc):%Y-%m-%d %H:%M} UTC"
        return State("failed", f"Failed {place}, {when}, rank {failure.rank}: {failure.why}", fraction)
    if step is None or record.last_written is None:
        since = "" if record.begun is None else f", {duration(max(now - record.begun, 0.0))} after it was begun"
        return State("empty", f"No metrics yet{since}: the first line comes after logging.every_steps steps.", fraction)
    age = max(now - record.last_written, 0.0)
    if _stopped_in_order(record):
        return State("stopped", f"Stopped {place}, where it saved, {duration(age)} ago.", fraction)
    if now - (record.last_sign or now) < _quiet_seconds(record):
        return State("running", f"Running, {place}; last line {duration(age)} ago{_time_left(record)}.", fraction)
    return State("stopped", f"Not running: ended {place}, {duration(age)} ago, without a summary.", fraction)


def _stopped_in_order(record: RunRecord) -> bool:
    """True = its last save is one that only a stop makes: at its very last step, and not when a save was due."""
    step, started_again = record.curves.last_step, record.last_sign != record.last_written
    every = [record.number(key) for key in ("checkpoint.save_every_steps", "evaluation.every_steps")]
    due = any(each is None or each < 1 or step % each == 0 for each in every)
    return step == record.checkpoints.latest and not due and not started_again


def last_failure(record: RunRecord) -> Failure | None:
    """The failure that ended the run; None where it has gone on since, or never failed."""
    if not record.failures or record.summary is not None:
        return None
    # Ranks that lost another say so after the one that knows why.
    last = record.failures[-1].time
    together = [failure for failure in record.failures if failure.time > last - 120.0]
    first = next((failure for failure in together if not failure.why.startswith("lost rank")), together[0])
    went_on = record.last_sign is not None and record.last_sign > last + 1.0
    return None if went_on else first


def _place(step: int | None, total: int | None) -> str:
    if step is None:
        return "before the first line of metrics"
    return f"at step {step:,}" + (f" of {total:,}" if total and step != total else "")


def _quiet_seconds(record: RunRecord) -> float:
    curve = record.curves.get("time/step_p95_seconds")
    if curve is None or curve.last is None or len(curve.steps) < 2:
        return MIN_QUIET_SECONDS
    interval = float(np.median(np.diff(curve.steps))) * curve.last
    return max(QUIET_INTERVALS * interval, MIN_QUIET_SECONDS)


def _time_left(record: RunRecord) -> str:
    curve, step, total = record.curves.get("time/step_p50_seconds"), record.curves.last_step, record.total_steps
    if curve is None or curve.last is None or step is None or not total:
        return ""
    return f"; about {duration((total - step) * curve.last)} of steps left"
