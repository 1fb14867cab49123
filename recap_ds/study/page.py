"""A study as a page, and its success rates as a picture of its own, for a README.

Whiskers are 95 % intervals over the episodes of all seeds together, rings are single seeds.
"""

from collections.abc import Sequence

from recap_ds import __version__
from recap_ds.report.interval_chart import Interval, interval_chart
from recap_ds.report.page import Chapter, grid, paragraph, table, whole_page
from recap_ds.report.picture import side_by_side
from recap_ds.report.svg import number
from recap_ds.study.recipe import StudyRecipe
from recap_ds.study.results import StudyResults
from recap_ds.study.table import (
    Pooled,
    first_row,
    pool,
    study_rows,
    success_interval,
    success_rate,
    throughput,
    told_success,
    told_throughput,
)

PICTURE_TITLE, THROUGHPUT_TITLE = "Success rate", "Successes per hour"
GUIDANCE_NOTE = "in brackets: guidance"


def study_page(recipe: StudyRecipe, results: StudyResults) -> str:
    """HTML that needs nothing else."""
    rows = pool(recipe, results)
    header, *lines = study_rows(recipe, rows)
    tasks = list(rows[0].units[0].entries[0].tasks)
    charts = [success_chart(rows, tasks, PICTURE_TITLE)]
    charts += [success_chart(rows, [task], f"{PICTURE_TITLE}: {task}") for task in tasks if len(tasks) > 1]
    charts.append(_throughput_chart(rows, tasks))
    missing = [unit.name for unit in recipe.units() if not results.has(unit)]
    chapters = [
        Chapter("Result", "".join(paragraph(line) for line in verdicts(recipe, rows, tasks))),
        Chapter("Success and throughput", grid(charts)),
        Chapter("All arms", table("95 % intervals over all episodes of all seeds", header, lines)),
        Chapter("Critic and labels", _critic_table(rows)),
        Chapter("Not run yet", paragraph(", ".join(missing)) if missing else ""),
    ]
    return whole_page(f"Study {recipe.name}", f"{recipe.env}, recap_ds {__version__}", chapters)


def study_picture(recipe: StudyRecipe, results: StudyResults) -> str:
    """An SVG file: success and throughput over all tasks, side by side."""
    rows = pool(recipe, results)
    tasks = list(rows[0].units[0].entries[0].tasks)
    return side_by_side(
        {PICTURE_TITLE: success_chart(rows, tasks, PICTURE_TITLE), THROUGHPUT_TITLE: _throughput_chart(rows, tasks)}
    )


def verdicts(recipe: StudyRecipe, rows: Sequence[Pooled], tasks: Sequence[str]) -> list[str]:
    """How every arm stands to the first one."""
    first, told = first_row(recipe, rows), []
    if first is None:
        return []
    other, pace = first.episodes(tasks), told_throughput(first, tasks)
    low, high = success_interval(other)
    for row in (row for row in rows if row is not first):
        mine = row.episodes(tasks)
        below, above = success_interval(mine)
        how = "more often than" if below > high else "less often than" if above < low else "not clearly otherwise than"
        told.append(
            f"{_name(row)} succeeds in {told_success(mine)} of {len(mine.success)} episodes, {how} {first.arm} with "
            f"{told_success(other)}. Successes per hour: {told_throughput(row, tasks)} against {pace}."
        )
    return told


def success_chart(rows: Sequence[Pooled], tasks: Sequence[str], title: str) -> str:
    intervals = []
    for row in rows:
        episodes = row.episodes(tasks)
        low, high = success_interval(episodes)
        seeds = tuple(success_rate(one.episodes(tasks)) for one in row.by_seed())
        note = f"{sum(episodes.success)} of {len(episodes.success)}"
        value = success_rate(episodes)
        intervals.append(Interval(_short_name(row), value, low, high, note, _color(row, rows), points=seeds))
    return interval_chart(title, intervals, note=GUIDANCE_NOTE)


def _throughput_chart(rows: Sequence[Pooled], tasks: Sequence[str]) -> str:
    intervals = [Interval(_short_name(row), *throughput(row, tasks), color=_color(row, rows)) for row in rows]
    return interval_chart(THROUGHPUT_TITLE, intervals, note=f"the time of failures counts; {GUIDANCE_NOTE}")


def _critic_table(rows: Sequence[Pooled]) -> str:
    """What of the critic and the labels may explain an arm."""
    lines = []
    for row in rows:
        for unit in row.units if row.entry == 0 else ():
            for task, told in unit.notes.get("labels", {}).items():
                shares = (number(told["forced_fraction"]), number(told["positive_fraction"]))
                figures = (f"{name.removeprefix('eval/')} {number(of)}" for name, of in unit.notes["critic"].items())
                lines.append([f"{unit.unit.name}, {task}", *shares, ", ".join(figures)])
    header = ("unit and task", "forced positive", "of the others positive", "critic, held out")
    return table("Shares of samples; the critic's figure is over all tasks", header, lines)


def _short_name(row: Pooled) -> str:
    """What fits beside a bar."""
    return f"{row.arm} ({row.guidance_beta:g})" if row.unit_has_more() else row.arm


def _color(row: Pooled, rows: Sequence[Pooled]) -> int:
    """One for all guidances of an arm."""
    return list(dict.fromkeys(each.arm for each in rows)).index(row.arm)


def _name(row: Pooled) -> str:
    return f"{row.arm}, guidance {row.guidance_beta:g}" if row.unit_has_more() else row.arm
