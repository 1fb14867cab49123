"""``metrics.jsonl`` -> curves by name. A run may be writing it, or may have ended in the middle of a line.

n values of one metric, in order of steps
"""

import json
import math
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    steps: np.ndarray  # [n] int64, rising
    values: np.ndarray  # [n] float64, NaN = was not finite

    @property
    def last(self) -> float | None:
        """The last finite value."""
        known = self.values[np.isfinite(self.values)]
        return float(known[-1]) if len(known) else None


class Curves(NamedTuple):
    by_name: dict[str, Curve]
    num_lines: int
    num_damaged: int  # whole lines that are no metrics
    last_step: int | None

    def get(self, name: str) -> Curve | None:
        return self.by_name.get(name)

    def under(self, prefix: str) -> dict[str, Curve]:
        """What follows ``prefix`` in names -> curve, in the order in which they were first written."""
        return {name.removeprefix(prefix): curve for name, curve in self.by_name.items() if name.startswith(prefix)}


NO_CURVES = Curves({}, 0, 0, None)


def read_curves(path: Path) -> Curves:
    """OSError where it cannot be read. A last line without its end is still being written and counts for nothing."""
    columns: dict[str, tuple[array, array]] = {}
    num_lines = num_damaged = 0
    last_step = None
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                last_step = _add(columns, json.loads(line))
                num_lines += 1
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                num_damaged += 1
    curves = {name: _in_order(*column) for name, column in columns.items()}
    return Curves(curves, num_lines, num_damaged, last_step)


def _add(columns: dict[str, tuple[array, array]], line: dict[str, float | None]) -> int:
    """One line's figures; returns its step."""
    step = int(line["step"])
    figures = [(name, math.nan if value is None else float(value)) for name, value in line.items() if name != "step"]
    for name, value in figures:
        steps, values = columns.setdefault(name, (array("q"), array("d")))
        steps.append(step)
        values.append(value)
    return step


def _in_order(steps: array, values: array) -> Curve:
    """By step; of a step that was taken twice, after a restart, what was written last."""
    step, value = np.array(steps, np.int64), np.array(values, np.float64)
    value[~np.isfinite(value)] = np.nan
    if len(step) > 1 and (np.diff(step) <= 0).any():
        _, last = np.unique(step[::-1], return_index=True)
        kept = len(step) - 1 - last
        step, value = step[kept], value[kept]
    return Curve(step, value)
