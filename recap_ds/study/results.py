"""The results file of a study: what was compared, and one object per finished unit. It is made to be committed.

    {"sha256", "format_version", "study", "shared", "arms": {name: facts}, "units": [unit, ...]}

Every episode's outcome and length is kept, so that intervals over several seeds come from the episodes themselves. A
file of another recipe is refused with the keys in which they differ; arms that nobody has run yet may change.
"""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from recap_ds.errors import UsageError
from recap_ds.files.records import read_checked_json, write_checked_json
from recap_ds.study.facts import ANOTHER_RECIPE, changed_arm_facts, changed_shared_facts, shared_facts
from recap_ds.study.recipe import StudyRecipe, Unit

FORMAT_VERSION = 1


class Episodes(NamedTuple):
    """Of one task; both lists in the order of the episodes."""

    success: list[bool]
    num_frames: list[int]


class Entry(NamedTuple):
    """One way to act of one unit's policy."""

    indicator: str | None
    guidance_beta: float
    tasks: dict[str, Episodes]


class UnitResult(NamedTuple):
    unit: Unit
    fps: float
    entries: list[Entry]
    notes: dict[str, Any]  # of its critic and labels
    seconds: dict[str, float]  # of its jobs, as far as they ran in the session that finished the unit


class StudyResults:
    """Safe to use by several threads of one process."""

    def __init__(self, path: Path, body: dict[str, Any], units: list[UnitResult]) -> None:
        self._path, self._body, self.units = path, body, units
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, recipe: StudyRecipe) -> "StudyResults":
        """What is there, or nothing yet. UsageError where it is damaged, or of another recipe."""
        body: dict[str, Any] = {"format_version": FORMAT_VERSION, "study": recipe.name, "arms": {}, "units": []}
        body["shared"] = shared_facts(recipe)
        if not path.exists():
            if not os.access(path.parent, os.W_OK):
                raise UsageError(f"--results {path}: its folder is not there, or cannot be written to")
            return cls(path, body, [])
        there = read_checked_json(path, FORMAT_VERSION)
        try:
            units = [_unit_from(record) for record in there["units"]]
            if len({result.unit for result in units}) < len(units):
                raise ValueError("it holds a unit twice")
            _check_recipe(path, there, recipe)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path}: is not a study's results ({type(error).__name__}: {error})") from None
        return cls(path, there, units)

    def has(self, unit: Unit) -> bool:
        return any(result.unit == unit for result in self.units)

    def add(self, result: UnitResult, arm_facts: dict[str, Any]) -> None:
        """Durable when it returns."""
        with self._lock:
            if self.has(result.unit):
                raise UsageError(f"{self._path}: holds {result.unit.name} already")
            self.units.append(result)
            self._body["arms"][result.unit.arm] = arm_facts
            self._body["units"].append(_record_of(result))
            write_checked_json(self._path, self._body)


def _check_recipe(path: Path, there: dict[str, Any], recipe: StudyRecipe) -> None:
    keys = changed_shared_facts(there["shared"], recipe)
    for name, facts in there["arms"].items():
        if name not in recipe.arms:
            keys.append(f"arms.{name} (gone)")
        else:
            keys += [f"arms.{name}.{key}" for key in changed_arm_facts(facts, recipe, name)]
    if keys:
        raise UsageError(f"{path}: holds results of another recipe: {', '.join(keys)}; {ANOTHER_RECIPE}")


def _record_of(result: UnitResult) -> dict[str, Any]:
    entries = [
        {
            "indicator": entry.indicator,
            "guidance_beta": entry.guidance_beta,
            "tasks": {
                task: {"success": "".join("01"[won] for won in episodes.success), "num_frames": episodes.num_frames}
                for task, episodes in entry.tasks.items()
            },
        }
        for entry in result.entries
    ]
    return {
        "arm": result.unit.arm,
        "seed": result.unit.seed,
        "fps": result.fps,
        "entries": entries,
        "notes": result.notes,
        "seconds": result.seconds,
    }


def _unit_from(record: dict[str, Any]) -> UnitResult:
    entries = []
    for entry in record["entries"]:
        tasks = {
            task: Episodes([letter == "1" for letter in told["success"]], [int(n) for n in told["num_frames"]])
            for task, told in entry["tasks"].items()
        }
        for episodes in tasks.values():
            if len(episodes.success) != len(episodes.num_frames):
                raise ValueError("as many outcomes as lengths")
        entries.append(Entry(entry["indicator"], float(entry["guidance_beta"]), tasks))
    unit = Unit(record["arm"], int(record["seed"]))
    return UnitResult(unit, float(record["fps"]), entries, record["notes"], record["seconds"])
