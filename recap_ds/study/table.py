"""What a study came to, row by row: an arm's units together, every seed by itself, and the first arm beside others.

Intervals are of 95 %: Wilson's over all episodes of all seeds, each of which plays scenes of its own, and for the
throughput percentiles of episodes drawn again. How much a seed of training matters is seen in the column of seeds.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from recap_ds.evaluate.intervals import compare_paired, successes_per_hour, throughput_interval, wilson_interval
from recap_ds.study.recipe import StudyRecipe, Unit
from recap_ds.study.results import Episodes, StudyResults, UnitResult


class Pooled(NamedTuple):
    """An arm under one guidance: its units in the order of their seeds."""

    arm: str
    entry: int
    guidance_beta: float
    units: list[UnitResult]

    def episodes(self, tasks: Iterable[str]) -> Episodes:
        parts = [unit.entries[self.entry].tasks[task] for unit in self.units for task in tasks]
        return Episodes([s for part in parts for s in part.success], [n for part in parts for n in part.num_frames])

    def by_seed(self) -> list["Pooled"]:
        return [self._replace(units=[unit]) for unit in self.units]

    def unit_has_more(self) -> bool:
        """True = the arm was judged under several guidances."""
        return len(self.units[0].entries) > 1


def pool(recipe: StudyRecipe, results: StudyResults) -> list[Pooled]:
    """The recipe's units in the order of its arms; what nobody has run yet is absent."""
    rows = []
    for arm in recipe.arms:
        wanted = {Unit(arm, seed) for seed in recipe.seeds_of(arm)}
        units = sorted((result for result in results.units if result.unit in wanted), key=lambda u: u.unit.seed)
        if units:
            rows += [Pooled(arm, number, entry.guidance_beta, units) for number, entry in enumerate(units[0].entries)]
    return rows


def study_table(recipe: StudyRecipe, results: StudyResults) -> str:
    """Lines of a Markdown table; '' where no unit is done."""
    rows = pool(recipe, results)
    if not rows:
        return ""
    header, *lines = study_rows(recipe, rows)
    return "\n".join(_line(cells) for cells in (header, ["---"] * len(header), *lines))


def first_row(recipe: StudyRecipe, rows: Sequence[Pooled]) -> Pooled | None:
    """What the others are held against, the recipe's first arm; None while nobody has run it."""
    return next((row for row in rows if row.arm == next(iter(recipe.arms))), None)


def study_rows(recipe: StudyRecipe, rows: Sequence[Pooled]) -> list[list[str]]:
    """The titles, then a row of text for each of ``rows``."""
    first, tasks = first_row(recipe, rows), list(rows[0].units[0].entries[0].tasks)
    titles = ["arm", "guidance", *tasks, "all", "by seed", "successes per hour", f"against {next(iter(recipe.arms))}"]
    return [titles, *(_cells(row, first, tasks) for row in rows)]


def _cells(row: Pooled, first: Pooled | None, tasks: Sequence[str]) -> list[str]:
    return [
        row.arm,
        f"{row.guidance_beta:g}",
        *(told_success(row.episodes([task])) for task in tasks),
        told_success(row.episodes(tasks)),
        ", ".join(f"{success_rate(one.episodes(tasks)):.2f}" for one in row.by_seed()),
        told_throughput(row, tasks),
        "" if first is None or row is first else _against(row, first, tasks),
    ]


def throughput(row: Pooled, tasks: Sequence[str]) -> tuple[float, float, float]:
    """Successes per hour, and between what they lie."""
    episodes = row.episodes(tasks)
    seconds = np.array(episodes.num_frames, np.float64) / row.units[0].fps
    success = np.array(episodes.success, bool)
    return successes_per_hour(success, seconds), *throughput_interval(success, seconds)


def _against(row: Pooled, first: Pooled, tasks: Sequence[str]) -> str:
    """The same scenes under the same seeds, episode by episode."""
    seeds = {unit.unit.seed for unit in row.units} & {unit.unit.seed for unit in first.units}
    if not seeds:
        return "no seed in common"
    mine, other = (
        np.array(part._replace(units=[u for u in part.units if u.unit.seed in seeds]).episodes(tasks).success, bool)
        for part in (row, first)
    )
    paired = compare_paired(mine, other)
    return f"{paired.only_this} won, {paired.only_reference} lost, p = {paired.p_value:.2g}"


def success_rate(episodes: Episodes) -> float:
    return sum(episodes.success) / len(episodes.success)


def success_interval(episodes: Episodes) -> tuple[float, float]:
    return wilson_interval(sum(episodes.success), len(episodes.success))


def told_success(episodes: Episodes) -> str:
    low, high = success_interval(episodes)
    return f"{success_rate(episodes):.2f} [{low:.2f}, {high:.2f}]"


def told_throughput(row: Pooled, tasks: Sequence[str]) -> str:
    rate, low, high = throughput(row, tasks)
    return f"{rate:.0f} [{low:.0f}, {high:.0f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
