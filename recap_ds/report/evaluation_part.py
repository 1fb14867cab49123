"""Evaluations on the page: success with intervals, paired comparisons, films; held-out figures, value calibration."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from recap_ds.report.charts import Line, Look, histogram_chart, line_chart
from recap_ds.report.evaluations import Entry, Evaluation, Film, HeldOut, Rate, Rollouts, ValueFigures
from recap_ds.report.interval_chart import Interval, interval_chart
from recap_ds.report.page import Html, folded, grid, paragraph, table
from recap_ds.report.svg import escape, number

FILM_TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}
# Films are put into the page as long as they are so much together, in bytes; the others are links.
MAX_EMBEDDED_BYTES = 8 * 2**20
MAX_FILMS = 12  # of one evaluation
MAX_TASK_CHARTS = 12  # the table has all tasks


def rollout_part(evaluations: Sequence[tuple[str, Evaluation]], out_folder: Path) -> str:
    """``evaluations``: each with what it is called on the page."""
    parts, films = [_side_by_side(evaluations)], Films(out_folder)
    for name, evaluation in evaluations:
        if evaluation.rollouts is not None:
            parts.append(_rollouts(name, evaluation, evaluation.rollouts, films))
    return "".join(parts)


def _side_by_side(evaluations: Sequence[tuple[str, Evaluation]]) -> str:
    """A chart per environment that several of the evaluations played; '' where there is none."""
    played: dict[str, list[tuple[str, Rollouts]]] = {}
    for name, evaluation in evaluations:
        if (rollouts := evaluation.rollouts) is not None:
            played.setdefault(rollouts.env, []).append((name, rollouts))
    charts = []
    for env, parts in played.items():
        rows = [
            _interval(entry, color)._replace(group=name)
            for color, (name, rollouts) in enumerate(parts)
            for entry in rollouts.entries
        ]
        if len(parts) > 1:
            charts.append(interval_chart(f"Success rate side by side: {env}", rows, high=1.0, note="95 % intervals"))
    return str(grid(charts))


def _rollouts(name: str, evaluation: Evaluation, rollouts: Rollouts, films: "Films") -> str:
    entries = rollouts.entries
    checkpoints = list(dict.fromkeys(entry.checkpoint for entry in entries))
    group = checkpoints if len(checkpoints) > 1 else [""]
    rows = [_interval(entry, group.index(entry.checkpoint) if len(group) > 1 else 0) for entry in entries]
    if len(group) > 1:
        rows = [row._replace(group=entry.checkpoint) for row, entry in zip(rows, entries, strict=True)]
    hours = [_hourly(row, entry.rate) for row, entry in zip(rows, entries, strict=True)]
    charts = [
        interval_chart("Success rate", rows, high=1.0, note="95 % intervals (Wilson)"),
        interval_chart("Successes an hour", hours, note="95 % intervals (bootstrap); failed time counts"),
    ]
    tasks = list(dict.fromkeys(task for entry in entries for task in entry.tasks))
    if len(tasks) > 1:
        charts += [_task_chart(task, entries) for task in tasks[:MAX_TASK_CHARTS]]
    told = f"{rollouts.num_episodes} episodes each from seed {rollouts.seed}; {evaluation.path}"
    return (
        f"<h3>{escape(name)}: {escape(rollouts.env)}</h3>{paragraph(told)}{grid(charts)}"
        f"{_paired_table(entries)}{_task_table(tasks, entries)}{films.show(entries)}"
    )


def _interval(entry: Entry, color: int) -> Interval:
    rate = entry.rate
    return Interval(entry.told, rate.success, *rate.success_interval, note=_count(rate), color=color)


def _hourly(row: Interval, rate: Rate) -> Interval:
    low, high = rate.per_hour_interval
    return row._replace(value=rate.per_hour, low=low, high=high)


def _count(rate: Rate) -> str:
    return f"{rate.num_successes} of {rate.num_episodes}"


def _task_chart(task: str, entries: Sequence[Entry]) -> str:
    rates = [(entry, entry.tasks[task]) for entry in entries if task in entry.tasks]
    rows = [Interval(entry.told, rate.success, *rate.success_interval, note=_count(rate)) for entry, rate in rates]
    return interval_chart(f"Success rate: {task}", rows, high=1.0)


def _paired_table(entries: Sequence[Entry]) -> Html:
    """Every way to act against the first one, on the same episodes."""
    header = ("against the first, episode by episode", "success", "mean frames", "won", "lost", "p (exact McNemar)")
    rows = [
        (
            entry.told if entry.checkpoint == entries[0].checkpoint else f"{entry.told} of {entry.checkpoint}",
            _count(entry.rate),
            number(entry.rate.mean_frames),
            *(("-", "-", "-") if entry.p_value is None else (str(entry.won), str(entry.lost), f"{entry.p_value:.3g}")),
        )
        for entry in entries
    ]
    return table("Paired comparison", header, rows) if len(entries) > 1 else Html("")


def _task_table(tasks: Sequence[str], entries: Sequence[Entry]) -> Html:
    rows = [(task, *(_count(entry.tasks[task]) if task in entry.tasks else "-" for entry in entries)) for task in tasks]
    return table("Successes by task", ("", *(entry.told for entry in entries)), rows) if len(tasks) > 1 else Html("")


class Films:
    """Films of a page: the first ones inside of it, the others as links."""

    def __init__(self, out_folder: Path) -> None:
        self._out_folder = out_folder
        self._room = MAX_EMBEDDED_BYTES

    def show(self, entries: Sequence[Entry]) -> Html:
        there = [(entry, film) for entry in entries for film in entry.films if _is_film(film)]
        shown = [self._one(entry, film) for entry, film in there[:MAX_FILMS]]
        missing = sum(len(entry.films) for entry in entries) - len(there)
        notes = []
        if len(there) > MAX_FILMS:
            notes.append(f"{len(there) - MAX_FILMS} more films are in {there[0][1].path.parent}.")
        if missing:
            notes.append(f"{missing} films that the results name are not there.")
        body = f"{grid(shown)}{''.join(paragraph(note) for note in notes)}"
        return folded(f"Films ({len(shown)})", body) if shown else Html("".join(paragraph(note) for note in notes))

    def _one(self, entry: Entry, film: Film) -> str:
        title = f"{entry.told}, episode {film.episode}: {'success' if film.success else 'failure'}"
        kind, size = FILM_TYPES[film.path.suffix.lower()], film.path.stat().st_size
        caption = f"<figcaption>{escape(title)}</figcaption>"
        if size > self._room:
            link = quote(os.path.relpath(film.path.resolve(), self._out_folder.resolve()))
            return f'<figure class="chart">{caption}<a href="./{link}">{escape(film.path.name)}</a></figure>'
        self._room -= size
        data = f"data:{kind};base64,{base64.b64encode(film.path.read_bytes()).decode()}"
        if kind == "image/gif":
            return f'<figure class="chart">{caption}<img src="{data}" alt="{escape(title)}"></figure>'
        player = f'<video controls preload="metadata" playsinline aria-label="{escape(title)}" src="{data}"></video>'
        return f'<figure class="chart">{caption}{player}</figure>'


def _is_film(film: Film) -> bool:
    """Results may come from elsewhere: nothing but a film, and none from outside of their folder."""
    folder = film.folder.resolve()
    return film.path.suffix.lower() in FILM_TYPES and film.path.resolve().is_relative_to(folder) and film.path.is_file()


def held_out_part(evaluations: Sequence[tuple[str, Evaluation]]) -> str:
    parts = []
    for name, evaluation in evaluations:
        if (held_out := evaluation.held_out) is not None:
            told = f"{held_out.num_samples:,} held-out samples of {evaluation.dataset_path}; {evaluation.path}"
            charts = [calibration_chart(f"Calibration of V: {each.name}", each.calibration) for each in held_out.values]
            charts += advantage_charts(held_out)
            body = f"{_action_table(held_out)}{_value_table(held_out.values)}{grid([c for c in charts if c])}"
            parts.append(f"<h3>{escape(name)}</h3>{paragraph(told)}{body}")
    return "".join(parts)


def calibration_chart(title: str, groups: Sequence[tuple[float, float, int]]) -> str:
    """What was predicted against what came, in groups of samples; '' where there are none."""
    if not groups:
        return ""
    values, returns, counts = (np.array(column, np.float64) for column in zip(*groups, strict=True))
    line = Line("mean return that came; dashed: as predicted", values, returns)
    note = f"{int(counts.sum()):,} samples in groups"
    look = Look(x_name="mean value predicted", diagonal=True, note=note, shows_last=False)
    return line_chart(title, [line], look)


def advantage_charts(held_out: HeldOut) -> list[str]:
    return [
        histogram_chart(f"Advantage: {task}, {source}", bars, 0.0, "zero")
        for task, sources in held_out.advantages.items()
        for source, bars in sources.items()
    ]


def _action_table(held_out: HeldOut) -> Html:
    header = ("frames", "error of actions", "the task's mean action", "ratio", "samples")
    rows = [
        (each.group.replace("_", " "), *map(number, each[1:4]), f"{each.num_samples:,}") for each in held_out.actions
    ]
    caption = "Actions, open loop, in the robot's units"
    if held_out.conditioning_gap is not None:
        caption += f"; conditioning gap {number(held_out.conditioning_gap)}"
    return table(caption, header, rows)


def _value_table(values: Sequence[ValueFigures]) -> Html:
    header = ("V", "rank correlation", "error", "best constant's", "separation", "shuffled-image gap", "samples")
    rows = [
        (
            each.name,
            number(each.rank_correlation),
            number(each.mae),
            number(each.constant_mae),
            number(each.separation),
            number(each.shuffled_image_gap),
            f"{each.num_samples:,}",
        )
        for each in values
    ]
    return table("Values against the Monte-Carlo return", header, rows)
