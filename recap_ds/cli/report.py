"""``recap-ds report RUN...``: a run, or several side by side, as one HTML file."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="runs, labels and evaluations as one HTML page with plots",
        description="One self-contained page: verdict, success with intervals, curves, labels, settings. Reads only; a "
        "run may be under way, stopped or failed.",
        epilog="example: recap-ds report runs/first runs/second --out comparison.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, an iteration of 'recap-ds iterate', SHARDS/labels/TAG, or an evaluation_results.json",
    )
    parser.add_argument(
        "--out", type=Path, metavar="HTML", help="default: report.html in the folder of a single run, else here"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.report.build import build_report, check_out, default_out, find_sources, write_report
    from recap_ds.report.svg import printable

    sources = find_sources(args.runs)
    out = check_out(args.out or default_out(sources))
    report = build_report(sources, out)
    write_report(out, report.page)
    for line in report.lines:
        print(line)
    print(printable(f"written: {out}"))
    return 0
