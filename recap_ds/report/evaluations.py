"""``evaluation_results.json`` as the report reads it: whole, or refused with the place that is not as it should be."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.errors import UsageError
from recap_ds.report.charts import Bars

RESULTS_NAME = "evaluation_results.json"


class Rate(NamedTuple):
    """What the episodes of one entry, or of one of its tasks, came to."""

    num_episodes: int
    num_successes: int
    success: float
    success_interval: tuple[float, float]
    per_hour: float
    per_hour_interval: tuple[float, float]
    mean_frames: float


class Film(NamedTuple):
    folder: Path  # of the results that name it
    path: Path
    episode: int
    success: bool


class Entry(NamedTuple):
    """One way to act of one checkpoint."""

    checkpoint: str
    told: str  # indicator and guidance
    rate: Rate
    tasks: dict[str, Rate]
    won: int  # episodes that it alone brought to success, of it and the first entry
    lost: int
    p_value: float | None  # None of the first entry
    films: tuple[Film, ...]


class Rollouts(NamedTuple):
    env: str
    num_episodes: int
    seed: int
    entries: tuple[Entry, ...]


class ActionError(NamedTuple):
    group: str  # of sources
    error: float
    constant_error: float
    ratio: float | None
    num_samples: int


class ValueFigures(NamedTuple):
    name: str  # of a task, or "all tasks"
    num_samples: int
    mae: float | None
    constant_mae: float | None
    rank_correlation: float | None
    separation: float | None
    shuffled_image_gap: float | None
    calibration: tuple[tuple[float, float, int], ...]  # mean value, mean return, samples


class HeldOut(NamedTuple):
    num_samples: int
    actions: tuple[ActionError, ...]
    values: tuple[ValueFigures, ...]
    conditioning_gap: float | None
    advantages: dict[str, dict[str, Bars]]  # task -> source


class Evaluation(NamedTuple):
    path: Path
    checkpoint: str
    dataset_path: str | None
    held_out: HeldOut | None
    rollouts: Rollouts | None


def read_evaluation(path: Path) -> Evaluation:
    """UsageError where it cannot be read, or was not written by launch/evaluate.py."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        held_out, rollouts = results["dataset_evaluation"], results.get("rollouts")
        return Evaluation(
            path,
            str(results["checkpoint"]),
            results["dataset_path"],
            None if held_out is None else _held_out(held_out),
            None if rollouts is None else _rollouts(rollouts, path.parent),
        )
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: is not what launch/evaluate.py writes ({what}); run it again") from None


def _held_out(results: dict[str, Any]) -> HeldOut:
    actions, value, flow = results["actions"], results["value"], results["flow_loss"]
    values = {} if value is None else {"all tasks": value["all"], **value["tasks"]}
    histograms = results.get("advantage_histograms") or {}  # newer than the first results
    return HeldOut(
        int(results["num_samples"]),
        tuple(_action_error(group, figures) for group, figures in (actions or {}).items()),
        tuple(_value_figures(name, figures) for name, figures in values.items()),
        None if flow is None else _optional(flow["conditioning_gap"]),
        {task: {source: _bars(part) for source, part in parts.items()} for task, parts in histograms.items()},
    )


def _action_error(group: str, figures: dict[str, Any]) -> ActionError:
    error, constant = _number(figures["error"]), _number(figures["constant_error"])
    return ActionError(group, error, constant, _optional(figures["ratio"]), int(figures["num_samples"]))


def _value_figures(name: str, figures: dict[str, Any]) -> ValueFigures:
    names = ("mae", "constant_mae", "rank_correlation", "separation", "shuffled_image_gap")
    groups = figures.get("calibration") or ()  # newer than the first results
    return ValueFigures(
        name,
        int(figures["num_samples"]),
        *(_optional(figures[each]) for each in names),
        tuple((_number(g["mean_value"]), _number(g["mean_return"]), int(g["num_samples"])) for g in groups),
    )


def _bars(histogram: dict[str, Any]) -> Bars:
    bars = Bars(_number(histogram["low"]), _number(histogram["high"]), [int(count) for count in histogram["counts"]])
    if not bars.high > bars.low:
        raise ValueError("a histogram over no range")
    return bars


def _rollouts(results: dict[str, Any], folder: Path) -> Rollouts:
    entries = tuple(_entry(entry, folder) for entry in results["entries"])
    return Rollouts(str(results["env"]), int(results["num_episodes"]), int(results["seed"]), entries)


def _entry(entry: dict[str, Any], folder: Path) -> Entry:
    paired, indicator = entry["paired_with_first_entry"], entry["indicator"]
    beta = entry["guidance_beta"]
    return Entry(
        str(entry["checkpoint"]),
        "no indicator" if indicator is None else f"{indicator}, beta {_number(beta):g}",
        _rate(entry),
        {task: _rate(figures) for task, figures in entry["tasks"].items()},
        0 if paired is None else int(paired["only_this"]),
        0 if paired is None else int(paired["only_reference"]),
        None if paired is None else _number(paired["p_value"]),
        tuple(
            Film(folder, folder / episode["video"], int(episode["episode"]), bool(episode["success"]))
            for episode in entry["episodes"]
            if episode["video"]
        ),
    )


def _rate(figures: dict[str, Any]) -> Rate:
    (low, high), (slow, fast) = figures["success_rate_interval"], figures["successes_per_hour_interval"]
    return Rate(
        int(figures["num_episodes"]),
        int(figures["num_successes"]),
        _number(figures["success_rate"]),
        (_number(low), _number(high)),
        _number(figures["successes_per_hour"]),
        (_number(slow), _number(fast)),
        _number(figures["mean_frames"]),
    )


def _number(value: Any) -> float:
    """ValueError for what no picture can show."""
    result = float(value)
    if not math.isfinite(result):
        raise ValueError("a figure that is not finite")
    return result


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)
