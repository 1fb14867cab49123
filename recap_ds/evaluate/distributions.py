"""Shapes of values and advantages, small enough for a results file: calibration in groups, histograms.

N samples
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recap_ds.batch import SOURCE_IDS

NUM_GROUPS = 10
NUM_BARS = 40
# What lies outside of these quantiles is counted in the outermost bars: one odd sample must not hide all others.
SHOWN_QUANTILES = (0.005, 0.995)


def calibration(values: np.ndarray, returns: np.ndarray) -> list[dict[str, float | int]] | None:
    """Mean value [N] and mean return [N] in up to NUM_GROUPS groups of about as many samples, by rising value.

    Where values are right the two means agree. Equal values share a group; None where there are no samples.
    """
    if not len(values):
        return None
    bounds = np.unique(np.quantile(values, np.linspace(0.0, 1.0, NUM_GROUPS + 1)[1:-1]))
    group = np.searchsorted(bounds, values, side="left")
    return [
        {
            "mean_value": float(values[mine].mean()),
            "mean_return": float(returns[mine].mean()),
            "num_samples": int(mine.sum()),
        }
        for mine in (group == number for number in np.unique(group))
    ]


def histogram(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """Counts of ``values`` [N] in NUM_BARS equal bars over [low, high]; the outermost ones hold what is outside."""
    if not high > low:  # all the same
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(values, low, high), bins=NUM_BARS, range=(low, high))
    return {"low": float(low), "high": float(high), "counts": counts.tolist()}


def histograms_by_task(
    values: np.ndarray, task: np.ndarray, source: np.ndarray, tasks: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> source -> ``histogram`` of ``values`` [N], all of a task over one range; without those of no sample."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for number, name in enumerate(tasks):
        of_task = values[task == number]
        if not len(of_task):
            continue
        low, high = np.quantile(of_task, SHOWN_QUANTILES).tolist()
        parts = {label: values[(task == number) & (source == index)] for label, index in SOURCE_IDS.items()}
        found[name] = {label: histogram(part, low, high) for label, part in parts.items() if len(part)}
    return found
