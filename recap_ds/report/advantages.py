"""Advantages and thresholds: of label files beside shards, and of the ring that a joint run's checkpoint holds.

N samples   K tasks   W window
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageRing
from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.checkpoint.layout import CHECKPOINTS_NAME, SHARED_NAME, step_name
from recap_ds.data.label_records import LABELS_NAME, TaskLabels
from recap_ds.data.labels import LabelColumns, load_label_record, read_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.evaluate.distributions import SHOWN_QUANTILES, calibration, histogram, histograms_by_task
from recap_ds.files.tensor_reader import TensorFileReader
from recap_ds.report.charts import Bars
from recap_ds.report.run_record import RunRecord

RING_VALUES, RING_COUNTS = "values", "counts"


class GroupLabels(NamedTuple):
    source: str
    outcome: str
    num_samples: int
    positive_share: float


class LabelView(NamedTuple):
    folder: Path
    tag: str
    made_of: str  # whose values, how the advantage is made
    tasks: dict[str, TaskLabels]
    groups: tuple[GroupLabels, ...]
    histograms: dict[str, dict[str, Bars]]  # task -> source
    calibration: dict[str, tuple[tuple[float, float, int], ...]]  # task -> mean value, mean return, samples
    problem: str  # why the samples themselves cannot be shown; '' if they are


class RingView(NamedTuple):
    """What a joint run's thresholds go by, at its latest checkpoint."""

    task: str
    bars: Bars
    threshold: float | None  # None until enough advantages are held
    sigma: float | None
    num_held: int


def is_labels(path: Path) -> bool:
    return (path / LABELS_NAME).is_file()


def read_label_view(folder: Path) -> LabelView:
    """``folder``: SHARDS/labels/TAG, or a link to one. UsageError where its record cannot be read."""
    folder = folder.resolve()
    shards, tag = folder.parent.parent, folder.name
    record = load_label_record(shards, tag)
    if record is None:
        raise UsageError(f"{folder}: has no {LABELS_NAME}; labels are made by launch/label.py")
    made_of = f"values of {record.values.critic()}; {record.told()}"
    view = LabelView(folder, tag, made_of, record.tasks, (), {}, {}, "")
    try:
        shard_set = ShardSet.open(shards)
        _, columns = read_labels(shard_set, tag)
    except UsageError as error:
        return view._replace(problem=str(error))
    return view._replace(
        groups=_groups(shard_set, columns),
        histograms=_histograms(shard_set, columns),
        calibration=_calibration(shard_set, columns),
    )


def find_labels(record: RunRecord) -> Path | None:
    """Where the labels of a policy run lie; None where it reads none, or they are no more there."""
    shards, tag = record.setting("data.shards"), record.setting("data.labels")
    if not shards or not tag:
        return None
    # The shards are named as seen from where training was started: here, or above the runs' folder.
    for base in (Path(), record.path.parent.parent):
        if is_labels(base / shards / "labels" / tag):
            return base / shards / "labels" / tag
    return None


def read_ring(record: RunRecord) -> list[RingView]:
    """[] where the run has none; UsageError where its checkpoint cannot be read."""
    tasks, fraction = record.tasks, record.number("recap.positive_fraction")
    window, minimum = record.number("recap.advantage_window"), record.number("recap.advantage_window_min")
    if record.stage != "joint" or record.checkpoints.latest is None or None in (fraction, window, minimum):
        return []
    path = record.path / CHECKPOINTS_NAME / step_name(record.checkpoints.latest) / SHARED_NAME
    reader = TensorFileReader(path)
    if {RING_VALUES, RING_COUNTS} - reader.tensors.keys():
        return []
    state = {name: reader.tensor(name).whole() for name in (RING_VALUES, RING_COUNTS)}
    if tuple(state[RING_VALUES].shape) != (len(tasks), window):
        raise UsageError(f"{path}: holds advantages of other tasks, or another recap.advantage_window")
    ring = AdvantageRing(len(tasks), int(window), "cpu")
    ring.load_state_dict(state)
    scale = ring.scale(fraction, minimum)
    held = state[RING_COUNTS].clamp(max=window).tolist()
    return [
        RingView(
            task,
            _bars(values[:count]),
            float(threshold) if ready else None,
            float(sigma) if ready else None,
            count,
        )
        for task, values, count, threshold, sigma, ready in zip(
            tasks, state[RING_VALUES].numpy(), held, *(part.tolist() for part in scale), strict=True
        )
        if count
    ]


def _bars(values: np.ndarray) -> Bars:
    return Bars(**histogram(values, *np.quantile(values, SHOWN_QUANTILES).tolist()))


def _histograms(shard_set: ShardSet, columns: LabelColumns) -> dict[str, dict[str, Bars]]:
    known, table = ~np.isnan(columns.advantage), shard_set.table
    tasks = list(shard_set.manifest.tasks)
    parts = histograms_by_task(columns.advantage[known], table.task[known], table.source[known], tasks)
    return {task: {source: Bars(**part) for source, part in of.items()} for task, of in parts.items()}


def _calibration(shard_set: ShardSet, columns: LabelColumns) -> dict[str, tuple[tuple[float, float, int], ...]]:
    known, task = ~np.isnan(columns.value) & ~np.isnan(columns.returns), shard_set.table.task
    found = {}
    for number, name in enumerate(shard_set.manifest.tasks):
        mine = known & (task == number)
        groups = calibration(columns.value[mine].astype(np.float64), columns.returns[mine].astype(np.float64))
        if groups:
            found[name] = tuple((g["mean_value"], g["mean_return"], g["num_samples"]) for g in groups)
    return found


def _groups(shard_set: ShardSet, columns: LabelColumns) -> tuple[GroupLabels, ...]:
    table, positive = shard_set.table, columns.indicator == INDICATOR_IDS["positive"]
    found = []
    for source, source_id in SOURCE_IDS.items():
        for outcome, outcome_id in OUTCOME_IDS.items():
            mine = (table.source == source_id) & (table.outcome == outcome_id)
            if mine.any():
                found.append(GroupLabels(source, outcome, int(mine.sum()), float(positive[mine].mean())))
    return tuple(found)
