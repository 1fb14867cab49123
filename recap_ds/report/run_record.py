"""What a run's folder holds, read without changing anything; pieces may be missing, damaged or under way.

What cannot be read is a line of ``problems``, which the page shows: a report is wanted most where something went wrong.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from recap_ds.checkpoint.layout import BEST, CHECKPOINTS_NAME, CONFIG_NAME, LATEST, linked_step, step_folders
from recap_ds.checkpoint.on_demand import EXPORTS_NAME
from recap_ds.errors import UsageError
from recap_ds.recipe import load_config
from recap_ds.report.curves import NO_CURVES, Curves, read_curves
from recap_ds.report.evaluations import RESULTS_NAME, Evaluation, read_evaluation

_FAILURE = re.compile(r"^=== (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC: (.*)$", re.MULTILINE)
Value = TypeVar("Value")


class Failure(NamedTuple):
    rank: str
    time: float  # seconds since the epoch
    why: str


class Checkpoints(NamedTuple):
    steps: tuple[int, ...]
    latest: int | None
    best: int | None


class RunRecord(NamedTuple):
    path: Path
    name: str  # its own among the runs of a report
    config: dict[str, Any]  # {} where there is none
    facts: dict[str, Any] | None  # run.json
    summary: dict[str, Any] | None
    ds_config: dict[str, Any] | None
    contract: dict[str, Any] | None
    curves: Curves
    begun: float | None  # when its settings were written, at its last start, in seconds since the epoch
    last_written: float | None  # when the last metrics were
    failures: tuple[Failure, ...]  # by time
    num_lists: dict[str, int]  # lines of damaged.jsonl, skipped.jsonl, spikes.jsonl, by file name
    checkpoints: Checkpoints
    evaluations: tuple[Evaluation, ...]
    problems: tuple[str, ...]

    def setting(self, key: str, default: Any = None) -> Any:
        """Of the configuration, by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def number(self, key: str) -> float | None:
        """A setting that is a number; None where it is none, as in a damaged configuration."""
        value = self.setting(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def total_steps(self) -> int | None:
        steps = self.number("training.num_training_steps")
        return int(steps) if steps is not None and steps >= 1 else None

    @property
    def versions(self) -> dict[str, Any]:
        versions = (self.facts or {}).get("versions")
        return versions if isinstance(versions, dict) else {}

    @property
    def tasks(self) -> list[str]:
        tasks = (self.contract or {}).get("tasks")
        return list(tasks) if isinstance(tasks, dict) else []

    @property
    def last_sign(self) -> float | None:
        """When it was last heard of: a start, or a line of metrics."""
        signs = [sign for sign in (self.begun, self.last_written) if sign is not None]
        return max(signs, default=None)

    @property
    def stage(self) -> str:
        return str(self.setting("training.stage", "joint"))


def is_run(path: Path) -> bool:
    """True = a folder in which training began; damaged ones too."""
    return any((path / name).is_file() for name in ("run.json", "metrics.jsonl", "summary.json")) or (
        (path / CONFIG_NAME).is_file() and (path / CHECKPOINTS_NAME).is_dir()
    )


def read_run(path: Path, name: str) -> RunRecord:
    problems: list[str] = []
    metrics = path / "metrics.jsonl"
    curves = _try(problems, read_curves, metrics) if metrics.is_file() else None
    if curves is not None and curves.num_damaged:
        problems.append(f"{metrics}: {curves.num_damaged} of its lines are damaged and left out")
    checkpoints = path / CHECKPOINTS_NAME
    results = sorted({*path.glob(RESULTS_NAME), *path.glob(f"{EXPORTS_NAME}/*/{RESULTS_NAME}")})
    evaluations = [_try(problems, read_evaluation, each) for each in results]
    return RunRecord(
        path=path,
        name=name,
        config=_config(path / CONFIG_NAME, problems),
        facts=_json(path / "run.json", problems),
        summary=_json(path / "summary.json", problems),
        ds_config=_json(path / "ds_config.json", problems),
        contract=_json(path / "contract.json", problems),
        curves=curves or NO_CURVES,
        begun=(path / CONFIG_NAME).stat().st_mtime if (path / CONFIG_NAME).is_file() else None,
        last_written=metrics.stat().st_mtime if curves is not None and curves.num_lines else None,
        failures=_failures(path / "failures", problems),
        num_lists={
            name: _num_lines(path / name, problems) for name in ("damaged.jsonl", "skipped.jsonl", "spikes.jsonl")
        },
        checkpoints=Checkpoints(
            tuple(step_folders(checkpoints)), linked_step(checkpoints, LATEST), linked_step(checkpoints, BEST)
        ),
        evaluations=tuple(each for each in evaluations if each is not None),
        problems=tuple(problems),
    )


def _try(problems: list[str], read: Callable[[Path], Value], path: Path) -> Value | None:
    """None where it cannot be read, which is then a problem."""
    try:
        return read(path)
    except UsageError as error:
        problems.append(str(error))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        problems.append(f"{path}: cannot be read ({reason})")
    return None


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """With defaults for keys that are newer than the run; as it stands where this version refuses it."""
    if not path.is_file():
        return {}
    try:
        return load_config(path).model_dump(mode="json")
    except UsageError as error:
        problems.append(f"{path}: is not as this version writes it ({error}); shown as it stands")
    plain = _try(problems, lambda each: yaml.safe_load(each.read_text(encoding="utf-8")), path)
    return _with_text_keys(plain) if isinstance(plain, dict) else {}


def _with_text_keys(values: dict) -> dict[str, Any]:
    return {str(key): _with_text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = _try(problems, lambda each: json.loads(each.read_text(encoding="utf-8")), path)
    if values is not None and not isinstance(values, dict):
        problems.append(f"{path}: is not as training writes it")
        return None
    return values


def _failures(folder: Path, problems: list[str]) -> tuple[Failure, ...]:
    found = []
    for path in sorted(folder.glob("rank_*.txt")):
        text = _try(problems, lambda each: each.read_text(encoding="utf-8", errors="replace"), path) or ""
        for when, why in _FAILURE.findall(text):
            time = datetime.strptime(when, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
            found.append(Failure(path.stem.removeprefix("rank_"), time, why))
    return tuple(sorted(found, key=lambda failure: failure.time))


def _num_lines(path: Path, problems: list[str]) -> int:
    if not path.is_file():
        return 0
    return _try(problems, lambda each: sum(1 for _ in each.open("rb")), path) or 0
