"""What a study came to, as Markdown: an arm's units together, every seed by itself, and the first arm beside others.

Intervals are of 95 %: Wilson's over all episodes of all seeds, and percentiles of episodes drawn again for the
throughput, where Wilson's at the mean time are no wider. They speak of episodes: how much a seed of training matters is
seen in the column of seeds.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.evaluate.intervals import compare_paired, successes_per_hour, throughput_interval, wilson_interval
from recap_ds.study.recipe import StudyRecipe
from recap_ds.study.results import Episodes, StudyResults, UnitResult

HEADER = ("arm", "guidance", "{tasks}", "all", "by seed", "successes per hour", "against {first}")


class Pooled(NamedTuple):
    """An arm under one guidance: its units in the order of their seeds."""

    arm: str
    entry: int
    guidance_beta: float
    units: list[UnitResult]

    def episodes(self, tasks: Iterable[str]) -> Episodes:
        parts = [unit.entries[self.entry].tasks[task] for unit in self.units for task in tasks]
        return Episodes([s for part in parts for s in part.success], [n for part in parts for n in part.num_frames])


def pool(recipe: StudyRecipe, results: StudyResults) -> list[Pooled]:
    """In the order of the recipe's arms; what nobody has run yet is absent."""
    rows = []
    for arm in recipe.arms:
        units = sorted((result for result in results.units if result.unit.arm == arm), key=lambda u: u.unit.seed)
        if units:
            rows += [Pooled(arm, number, entry.guidance_beta, units) for number, entry in enumerate(units[0].entries)]
    return rows


def study_table(recipe: StudyRecipe, results: StudyResults) -> str:
    """Lines of a Markdown table; '' where no unit is done."""
    rows = pool(recipe, results)
    if not rows:
        return ""
    first, tasks = rows[0], list(rows[0].units[0].entries[0].tasks)
    titles = [title for name in HEADER for title in (tasks if name == "{tasks}" else [name.format(first=first.arm)])]
    lines = [_line(titles), _line(["---"] * len(titles))]
    return "\n".join([*lines, *(_line(_cells(row, first, tasks)) for row in rows)])


def _cells(row: Pooled, first: Pooled, tasks: Sequence[str]) -> list[str]:
    everything = row.episodes(tasks)
    by_seed = [_rate(Pooled(row.arm, row.entry, row.guidance_beta, [unit]).episodes(tasks)) for unit in row.units]
    seconds = np.array(everything.num_frames, np.float64) / row.units[0].fps
    success = np.array(everything.success, bool)
    low, high = throughput_interval(success, seconds)
    return [
        row.arm,
        f"{row.guidance_beta:g}",
        *(_with_interval(row.episodes([task])) for task in tasks),
        _with_interval(everything),
        ", ".join(f"{rate:.2f}" for rate in by_seed),
        f"{successes_per_hour(success, seconds):.0f} [{low:.0f}, {high:.0f}]",
        "" if row is first else _against(row, first, tasks),
    ]


def _against(row: Pooled, first: Pooled, tasks: Sequence[str]) -> str:
    """The same scenes under the same seeds, episode by episode."""
    seeds = {unit.unit.seed for unit in row.units} & {unit.unit.seed for unit in first.units}
    mine, other = (
        np.array(part._replace(units=[u for u in part.units if u.unit.seed in seeds]).episodes(tasks).success, bool)
        for part in (row, first)
    )
    if not seeds:
        return "no seed in common"
    paired = compare_paired(mine, other)
    return f"{paired.only_this} won, {paired.only_reference} lost, p = {paired.p_value:.2g}"


def _rate(episodes: Episodes) -> float:
    return sum(episodes.success) / len(episodes.success)


def _with_interval(episodes: Episodes) -> str:
    low, high = wilson_interval(sum(episodes.success), len(episodes.success))
    return f"{_rate(episodes):.2f} [{low:.2f}, {high:.2f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
