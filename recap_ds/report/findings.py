"""What a person who knows such runs would say first: is it learning, is it healthy, what next. Pure functions.

Bounds are rules of thumb, named here; each finding gives the figures it goes by.
"""

import shlex
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from recap_ds.report.curves import Curve
from recap_ds.report.evaluations import Rollouts
from recap_ds.report.run_record import RunRecord
from recap_ds.report.state import State
from recap_ds.report.svg import rough
from recap_ds.train.gate import GATES, Gate

Level = Literal["good", "note", "warn", "bad"]

MIN_IMPROVEMENT = 0.02  # of the first figure: less is called no improvement
WORSE_THAN_BEST = 0.05
MIN_RANK_CORRELATION = 0.3
MIN_SHUFFLED_GAP = 0.05
MIN_CONDITIONING_GAP = 0.01
MAX_ACTION_RATIO = 0.9
MAX_DATA_WAIT = 0.2  # of the time of steps
MAX_FRACTION_ERROR = 0.15
CLIPPED_BY = 20.0  # the usual gradient norm over training.max_grad_norm
SLOWED_BY = 0.7
VALUE_BOUNDS = (-1.25, 0.25)  # of Q's median where returns lie in [-1, 0]
SURE_P_VALUE = 0.05
WIDE_INTERVAL = 0.3
GOOD_SUCCESS = 0.5
RECENT_LINES = 10
WARM_UP_LINES = 5


class Finding(NamedTuple):
    level: Level
    text: str
    mend: str = ""  # what to do about it


def findings_of(record: RunRecord, state: State) -> list[Finding]:
    """The weightiest first; within a level in the order of looking."""
    found = [
        *(finding for evaluation in record.evaluations for finding in rollout_findings(evaluation.rollouts)),
        *_learning(record),
        *_values(record),
        *_policy(record),
        *_skips(record),
        *_data(record),
        *_speed(record),
        *_failures(record, state),
        *(Finding("warn", problem) for problem in record.problems),
    ]
    order = {"bad": 0, "warn": 1, "good": 2, "note": 3}
    return sorted(found, key=lambda finding: order[finding.level])


def headline(state: State, findings: list[Finding]) -> tuple[Level, str]:
    """The verdict in a few words and how bad it is."""
    levels = [finding.level for finding in findings]
    states = {
        "done": "Finished",
        "running": "Running",
        "failed": "Failed",
        "stopped": "Stopped before its end",
        "empty": "Nothing to see yet",
    }
    told = states[state.kind]
    if state.kind == "failed" or "bad" in levels:
        return "bad", f"{told}; something is wrong" if state.kind != "failed" else told
    if "warn" in levels:
        count = levels.count("warn")
        return "warn", f"{told}; {count} thing{'s' if count > 1 else ''} to look at"
    if state.kind in ("empty", "stopped"):
        return "note", told
    return ("good", f"{told}, and learning") if "good" in levels else ("note", told)


def gate_of(record: RunRecord) -> Gate:
    return GATES.get(str(record.setting("evaluation.gate")), GATES["loss"])


def _learning(record: RunRecord) -> Iterator[Finding]:
    gate = gate_of(record)
    curve = record.curves.get(gate.metric)
    values = np.empty(0) if curve is None else curve.values[np.isfinite(curve.values)]
    if curve is None or len(values) < 2:
        yield from _training_loss(record)
        return
    yield from _held_out(gate, curve)


def _held_out(gate: Gate, curve: Curve) -> Iterator[Finding]:
    known = np.isfinite(curve.values)
    steps, values = curve.steps[known], curve.values[known]
    best = int(values.argmin() if gate.lower_is_better else values.argmax())
    first, last = float(values[0]), float(values[-1])
    gain = (first - values[best] if gate.lower_is_better else values[best] - first) / max(abs(first), 1e-9)
    loss = (last - values[best] if gate.lower_is_better else values[best] - last) / max(abs(float(values[best])), 1e-9)
    said = (
        f"Held out, {gate.metric} went from {rough(first)} (step {steps[0]:,}) to {rough(float(values[best]))} "
        f"(step {steps[best]:,})"
    )
    if gain < MIN_IMPROVEMENT:
        mend = "look at the losses per source, the learning rates and the gradient norms"
        yield Finding("warn", f"{said}: no improvement worth the name.", mend)
    elif loss > WORSE_THAN_BEST and best < len(values) - 2:
        mend = "checkpoints/best holds the best one; more data, or fewer steps"
        yield Finding("warn", f"{said}; the last is {loss:.0%} worse, {rough(last)}: it overfits.", mend)
    else:
        yield Finding("good", f"{said}; the last is {rough(last)}.")


def _training_loss(record: RunRecord) -> Iterator[Finding]:
    curve = record.curves.get("train/loss")
    if curve is None:
        return
    values = curve.values[np.isfinite(curve.values)]
    if len(values) < 4:
        yield Finding("note", f"Too few lines of metrics so far ({len(curve.steps)}) to say whether it learns.")
        return
    part = max(len(values) // 10, 2)
    first, last = float(np.median(values[:part])), float(np.median(values[-part:]))
    said = f"The training loss went from {rough(first)} to {rough(last)}; there are no two held-out evaluations yet"
    falls = last < first - MIN_IMPROVEMENT * abs(first)
    yield Finding("good", f"{said}.") if falls else Finding("warn", f"{said}, and it does not fall.")


def _values(record: RunRecord) -> Iterator[Finding]:
    correlation, gap = (
        record.curves.get("eval/value_rank_correlation"),
        record.curves.get("eval/value_shuffled_image_gap"),
    )
    if correlation is not None and correlation.last is not None:
        said = f"V orders held-out frames with rank correlation {rough(correlation.last)} to the return"
        if correlation.last < MIN_RANK_CORRELATION:
            mend = "labels and indicators will be noise: train the critic longer, or on its own (training.stage=critic)"
            yield Finding("warn", f"{said}: hardly at all.", mend)
        elif gate_of(record).metric != "eval/value_rank_correlation":  # else it was said already
            yield Finding("good", f"{said}.")
    if gap is not None and gap.last is not None and gap.last < MIN_SHUFFLED_GAP:
        said = f"V errs hardly more with another episode's pictures (gap {rough(gap.last)}): it does not look at them."
        state = record.setting("value.critic") == "distributional" and record.setting("value.reads_state") is True
        yield Finding("warn", said, f"{'value.reads_state=false, ' if state else ''}more steps, or a better camera")
    q = record.curves.get("train/q/p50")
    low, high = VALUE_BOUNDS
    sparse = record.setting("value.reward", "sparse_time") == "sparse_time"
    if sparse and q is not None and q.last is not None and not low <= q.last <= high:
        mend = "lower training.critic_learning_rate or iql.target_update_rate"
        yield Finding("bad", f"Q's median is {rough(q.last)}, though returns lie in [-1, 0]: it diverges.", mend)


def _policy(record: RunRecord) -> Iterator[Finding]:
    ratio = record.curves.get("eval/action_error_ratio/demo_and_human")
    if ratio is not None and ratio.last is not None:
        said = f"On demonstrated and human frames the actions err {rough(ratio.last)} times as much as the task's mean"
        if ratio.last > MAX_ACTION_RATIO:
            yield Finding("warn", f"{said}: no better than a constant.", "train longer, or look at prompts and cameras")
        else:
            yield Finding("good", f"{said}.")
    gap, extraction = record.curves.get("eval/conditioning_gap"), record.setting("recap.policy_extraction")
    if gap is not None and gap.last is not None and extraction != "weighted" and gap.last < MIN_CONDITIONING_GAP:
        said = f"The indicator changes the policy's loss by {gap.last:.1%} only: guidance will do nothing."
        yield Finding("warn", said, "look at the labels and the share of positives")
    wanted = record.number("recap.positive_fraction")
    for task, curve in record.curves.under("train/positive_fraction/").items():
        recent = curve.values[-RECENT_LINES:]
        if record.stage != "joint" or wanted is None or len(recent) < RECENT_LINES or not np.isfinite(recent).any():
            continue
        mean = float(np.nanmean(recent))
        if abs(mean - wanted) > MAX_FRACTION_ERROR:
            said = f"{mean:.0%} of the not-forced samples of '{task}' are positive, {wanted:.0%} were asked for."
            yield Finding("warn", said, "advantages move faster than their window: lower recap.advantage_window")


def _skips(record: RunRecord) -> Iterator[Finding]:
    skipped, spikes = record.curves.get("train/skipped_steps"), record.curves.get("train/spikes")
    rollbacks = record.curves.get("train/rollbacks")
    if record.num_lists["skipped.jsonl"] or (skipped is not None and skipped.last):
        count = int(skipped.last) if skipped is not None and skipped.last else record.num_lists["skipped.jsonl"]
        said = f"{count:,} step{'s' if count > 1 else ''} had gradients that are not finite and were skipped."
        yield Finding("warn", said, "their samples are in skipped.jsonl; a lower learning rate helps as a rule")
    if record.num_lists["spikes.jsonl"] or (spikes is not None and spikes.last):
        count = int(spikes.last) if spikes is not None and spikes.last else record.num_lists["spikes.jsonl"]
        back = f", and the run went back {int(rollbacks.last)} times" if rollbacks and rollbacks.last else ""
        yield Finding("warn", f"{count:,} loss spikes were skipped{back}.", "their samples are in spikes.jsonl")
    loss = record.curves.get("train/loss")
    if loss is not None and len(loss.values) and not np.isfinite(loss.values[-1]):
        yield Finding("bad", f"The last training loss (step {loss.steps[-1]:,}) is not finite.", "see skipped.jsonl")
    norm, limit = record.curves.get("train/grad_norm"), record.number("training.max_grad_norm")
    if norm is not None and limit and np.isfinite(norm.values).any():
        usual = float(np.nanmedian(norm.values))
        if usual > CLIPPED_BY * limit:
            said = f"The gradient norm is {rough(usual)} as a rule, training.max_grad_norm is {rough(limit)}."
            yield Finding("note", said, "every step is clipped: the norm says nothing about the size of a step")


def _data(record: RunRecord) -> Iterator[Finding]:
    replaced = record.curves.get("data/replaced_total")
    if replaced is not None and replaced.last:
        mend = f"recap-ds shards verify {shlex.quote(str(record.setting('data.shards', 'SHARDS')))}"
        yield Finding("warn", f"{int(replaced.last):,} damaged samples were replaced; damaged.jsonl lists them.", mend)
    wait, step = record.curves.get("time/data_wait_seconds"), record.curves.get("time/step_p50_seconds")
    shares = np.empty(0)
    if wait is not None and step is not None and len(wait.values) == len(step.values):
        shares = wait.values / np.maximum(step.values, 1e-9)
    shares = shares[np.isfinite(shares)]
    if len(shares) < WARM_UP_LINES:  # workers start, files are read for the first time
        return
    share = float(np.median(shares))
    if share > MAX_DATA_WAIT:
        said = f"{share:.0%} of a step is waiting for data."
        yield Finding("warn", said, f"data.num_workers is {record.setting('data.num_workers', '?')}: more of them")


def _speed(record: RunRecord) -> Iterator[Finding]:
    curve = record.curves.get("time/samples_per_second")
    values = np.empty(0) if curve is None else curve.values[np.isfinite(curve.values)]
    if len(values) < 2:
        return
    usual, last = float(np.median(values)), float(np.median(values[-RECENT_LINES:]))
    if len(values) > 3 * RECENT_LINES and last < SLOWED_BY * usual:
        said = f"{rough(last)} samples a second now, {rough(usual)} over the run: it has become slower."
        yield Finding("warn", said, "look at data wait and step times below, and at the machines")
    else:
        yield Finding("note", f"{rough(usual)} samples a second.")


def _failures(record: RunRecord, state: State) -> Iterator[Finding]:
    if record.failures and state.kind != "failed":
        last = record.failures[-1]
        yield Finding("note", f"An earlier start failed (rank {last.rank}: {last.why}); it went on since.")


def rollout_findings(rollouts: Rollouts | None) -> Iterator[Finding]:
    """Success of the best way to act, and whether its lead over the first can be chance."""
    if rollouts is None or not rollouts.entries:
        return
    first = rollouts.entries[0]
    best = max(rollouts.entries, key=lambda entry: (entry.rate.success, entry.rate.per_hour))
    low, high = best.rate.success_interval
    said = (
        f"{rollouts.env}: {best.rate.success:.0%} success [{low:.0%}, {high:.0%}] over {best.rate.num_episodes} "
        f"episodes, {best.rate.per_hour:,.0f} an hour ({best.told})"
    )
    if best is not first and best.p_value is not None:
        chance = "can well be chance" if best.p_value > SURE_P_VALUE else "is hardly chance"
        said += (
            f"; against {first.told} it won {best.won} and lost {best.lost} of the same episodes, which {chance} "
            f"(p = {best.p_value:.2g}{_best_of(len(rollouts.entries))})"
        )
    mend = "more --episodes narrow that" if high - low > WIDE_INTERVAL else ""
    level: Level = "good" if best.rate.success >= GOOD_SUCCESS else "note" if best.rate.success > 0 else "warn"
    yield Finding(level, f"{said}.", mend)


def _best_of(num_entries: int) -> str:
    """The best of many looks better than it is."""
    return f", not corrected for being the best of {num_entries}" if num_entries > 2 else ""
