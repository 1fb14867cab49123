"""``recap-ds report``: what was named, read and put together into one page."""

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from recap_ds import __version__
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file
from recap_ds.report import panels
from recap_ds.report.advantage_part import label_part, ring_part
from recap_ds.report.advantages import LabelView, find_labels, is_labels, read_label_view, read_ring
from recap_ds.report.configuration import differing_part, settings_part
from recap_ds.report.evaluation_part import held_out_part, rollout_part
from recap_ds.report.evaluations import RESULTS_NAME, Evaluation, read_evaluation
from recap_ds.report.findings import rollout_findings
from recap_ds.report.overview import Judged, findings_card, judge, key_figures, verdict_card
from recap_ds.report.page import Chapter, grid, paragraph, whole_page
from recap_ds.report.run_record import RunRecord, is_run, read_run
from recap_ds.report.svg import printable

REPORT_NAME = "report.html"
MAX_RUNS = 8  # as many as there are colours
JOBS = ("critic", "policy")  # runs in the folder of an iteration


class Sources(NamedTuple):
    """Paths by what they are, each once, in the order in which they were named."""

    runs: list[Path]
    labels: list[Path]
    results: list[Path]


class Report(NamedTuple):
    page: str
    lines: list[str]  # the verdict on every run, and what else people read on a terminal


def find_sources(paths: Sequence[Path]) -> Sources:
    """UsageError for a path that is nothing a report is about."""
    sources = Sources([], [], [])
    for path in paths:
        try:
            _sort(path, sources)
        except OSError as error:
            raise UsageError(f"RUN {path}: cannot be read ({error.strerror})") from None
    sources = Sources(*(list({each.resolve(): each for each in part}.values()) for part in sources))
    if len(sources.runs) > MAX_RUNS:
        raise UsageError(f"RUN: {len(sources.runs)} runs were named, one page compares up to {MAX_RUNS}; name fewer")
    return sources


def _sort(path: Path, sources: Sources) -> None:
    jobs = [path / job for job in JOBS if is_run(path / job)]
    iterations = sorted(each for each in path.glob("iteration_*") if each.is_dir())
    if path.is_file() and path.suffix == ".json":
        sources.results.append(path)
    elif is_labels(path):
        sources.labels.append(path)
    elif is_run(path):
        sources.runs.append(path)
    elif jobs:
        sources.runs.extend(jobs)
        sources.labels.extend([path / "labels"] if is_labels(path / "labels") else [])
    elif iterations:
        for iteration in iterations:
            _sort(iteration, sources)
    elif (path / RESULTS_NAME).is_file():
        sources.results.append(path / RESULTS_NAME)
    else:
        raise UsageError(f"RUN {path}: {_what_is_wrong(path)}")


def _what_is_wrong(path: Path) -> str:
    if path.is_dir() and any(is_run(each) for each in path.iterdir()):
        return f"holds runs and is none; name them, {path}/* for all"
    what = "is no run" if path.exists() else "there is no such file or folder"
    return f"{what}; name a run folder, an iteration, SHARDS/labels/TAG, or an {RESULTS_NAME}"


def default_out(sources: Sources) -> Path:
    """In the folder of a single run; of several, here."""
    return sources.runs[0] / REPORT_NAME if len(sources.runs) == 1 else Path(REPORT_NAME)


def build_report(sources: Sources, out: Path, title: str | None = None) -> Report:
    """``out``: where the page will lie, as films are named relative to it. ``title`` None: what it is about."""
    now = time.time()
    runs = [_judge_run(path, name, now) for path, name in zip(sources.runs, run_names(sources.runs), strict=True)]
    results = [read_evaluation(path) for path in sources.results]
    records = [each.record for each in runs]
    evaluations = [*_evaluations_of(records), *((evaluation.checkpoint, evaluation) for evaluation in results)]
    labels, label_notes = _read_labels(records, sources.labels)
    several = len(runs) > 1
    chapters = [
        Chapter("Verdict", _verdict(runs, results)),
        Chapter("Key figures", str(key_figures(runs)) if runs else ""),
        Chapter("What differs", str(differing_part(records)) if several else ""),
        Chapter("Success in environments", rollout_part(evaluations, out.parent)),
        Chapter("Held-out evaluation", held_out_part(evaluations)),
    ]
    chapters += [Chapter(title, grid(panels.chapter_charts(part, records))) for title, part in panels.CHAPTERS.items()]
    chapters += [
        Chapter("Labels and thresholds", "".join([*label_notes, *map(label_part, labels), *_rings(records)])),
        Chapter("Settings and provenance", "".join(settings_part(record, several) for record in records)),
    ]
    names = [record.name for record in records]
    names += [f"labels {path.resolve().name}" for path in sources.labels] + [
        evaluation.checkpoint for evaluation in results
    ]
    written = f"{datetime.fromtimestamp(now, timezone.utc):%Y-%m-%d %H:%M} UTC"
    page = whole_page(title or ", ".join(dict.fromkeys(names)), f"recap_ds {__version__}, written {written}", chapters)
    return Report(page, [printable(each.line) for each in runs])


def _judge_run(path: Path, name: str, now: float) -> Judged:
    try:
        return judge(read_run(path, name), now)
    except OSError as error:
        raise UsageError(f"RUN {path}: cannot be read ({error.strerror})") from None


def check_out(out: Path) -> Path:
    """UsageError for a name that could be a file of a run's own."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a page is written as .html; name such a file")
    return out


def write_report(out: Path, page: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, page.encode())
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None


def run_names(runs: Sequence[Path]) -> list[str]:
    """As short as they can be while each is its own: the folder's name, or as much of the path as it takes."""
    whole = [Path(os.path.abspath(path)) for path in runs]
    for length in range(1, max((len(path.parts) for path in whole), default=0)):
        names = [" ".join(printable("/".join(path.parts[-length:])).split()) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [printable(str(path)) for path in whole]


def _verdict(runs: Sequence[Judged], results: Sequence[Evaluation]) -> str:
    cards = [verdict_card(each, runs[0] if len(runs) > 1 else None) for each in runs]
    # One alone needs no name.
    told = [
        finding._replace(text=f"{each.checkpoint}: {finding.text}" if len(results) > 1 else finding.text)
        for each in results
        for finding in rollout_findings(each.rollouts)
    ]
    return "".join([*cards, findings_card(told)])


def _evaluations_of(records: Sequence[RunRecord]) -> list[tuple[str, Evaluation]]:
    """Each with its name on the page: the run's, with that of the export where it has several."""
    return [
        (f"{record.name}, {each.path.parent.name}" if len(record.evaluations) > 1 else record.name, each)
        for record in records
        for each in record.evaluations
    ]


def _read_labels(records: Sequence[RunRecord], named: Sequence[Path]) -> tuple[list[LabelView], list[str]]:
    """Those that were named, which must be readable, and those of policy runs where they are found; notes on others."""
    views = {path.resolve(): read_label_view(path) for path in named}
    notes = []
    for record in records:
        tag, path = record.setting("data.labels"), find_labels(record)
        if tag and path is None:
            where = f"{record.setting('data.shards')}/labels/{tag}"
            notes.append(paragraph(f"{record.name}: its labels '{tag}' are not at {where}; name their folder too."))
        elif path is not None and path.resolve() not in views:
            try:
                views[path.resolve()] = read_label_view(path)
            except UsageError as error:
                notes.append(paragraph(f"{record.name}: {error}"))
    return list(views.values()), notes


def _rings(records: Sequence[RunRecord]) -> list[str]:
    parts = []
    for record in records:
        try:
            parts.append(ring_part(record.name, read_ring(record)))
        except UsageError as error:
            parts.append(paragraph(f"{record.name}: {error}"))
    return parts
