"""Labels as text: what they were made of, counts per task, and who is positive by source and outcome."""

import numpy as np

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.data.label_records import LabelRecord
from recap_ds.data.labels import LabelColumns, read_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.show import text_table


def label_table(shard_set: ShardSet, tag: str) -> str:
    """Text of several lines."""
    record, columns = read_labels(shard_set, tag)
    return "\n\n".join((_facts(shard_set, tag, record), _tasks(record), _groups(shard_set, columns)))


def _facts(shard_set: ShardSet, tag: str, record: LabelRecord) -> str:
    return (
        f"{shard_set.folder}: labels '{tag}' of {shard_set.num_samples} samples\n"
        f"values '{record.values_tag}' of {record.values.critic()}, {record.values.precision}\n"
        f"{record.told()}"
    )


def _tasks(record: LabelRecord) -> str:
    header = ("task", "L_task", "samples", "forced", "ranked", "positive", "fraction", "threshold", "sigma", "unknown")
    rows = []
    for name, task in record.tasks.items():
        figures = (task.positive_fraction, task.threshold, task.sigma)
        rows.append(
            (
                name,
                record.values.max_length[name],
                task.num_samples,
                task.num_forced,
                task.num_known,
                task.num_positive,
                *("-" if figure is None else f"{figure:.4f}" for figure in figures),
                task.num_samples - task.num_forced - task.num_known,
            )
        )
    return text_table(header, rows)


def _groups(shard_set: ShardSet, columns: LabelColumns) -> str:
    """Share of positive samples by (source, outcome of the episode)."""
    header = ("source", "outcome", "samples", "positive share", "mean value", "mean return", "mean advantage")
    rows = []
    for source, source_id in SOURCE_IDS.items():
        for outcome, outcome_id in OUTCOME_IDS.items():
            mine = (shard_set.table.source == source_id) & (shard_set.table.outcome == outcome_id)
            if mine.any():
                share = (columns.indicator[mine] == INDICATOR_IDS["positive"]).mean()
                means = [_mean(column[mine]) for column in (columns.value, columns.returns, columns.advantage)]
                rows.append((source, outcome, int(mine.sum()), f"{share:.4f}", *means))
    return text_table(header, rows)


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.4f}" if len(known) else "-"
