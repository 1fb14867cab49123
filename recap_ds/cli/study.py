"""``recap-ds study --config RECIPE``: several ways to learn from the same data, compared in an environment."""

import argparse
from pathlib import Path

from recap_ds.cli.numbers import count


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "study",
        help="compare ways to learn from the same data: collect, pre-train, train every arm and seed, evaluate",
        description="Collect the data, pre-train once, then train and evaluate every arm of RECIPE under every seed. "
        "Finished units are in the results file, one object each; the same command goes on with what is missing.",
        epilog="example: recap-ds study --config launch/recipes/studies/metaworld.yaml --jobs 2",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE", help="see launch/recipes/studies/")
    parser.add_argument("--results", type=Path, metavar="JSON", help="default: beside RECIPE, under its name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of data and runs (default: studies/<its name>)")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="units side by side (default: %(default)s)")
    parser.add_argument(
        "--table", action="store_true", help="run nothing: table, page and picture of what the results file holds"
    )
    parser.add_argument(
        "--programs", type=Path, default=Path("launch"), metavar="FOLDER", help="launch scripts (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.files.lock import exclusive
    from recap_ds.report.build import write_report
    from recap_ds.study.driver import run_study  # with torch, which takes a second
    from recap_ds.study.page import study_page, study_picture
    from recap_ds.study.reading import load_study_recipe
    from recap_ds.study.results import StudyResults
    from recap_ds.study.table import study_table

    recipe = load_study_recipe(args.config)
    path = args.results or args.config.with_suffix(".json")
    results = StudyResults.open(path, recipe)
    out = args.out or Path("studies") / recipe.name
    if not args.table:
        # Again under the lock, before which another study may have added units. And before it too: to make the lock's
        # file would make a folder that is not there.
        with exclusive(path.with_name(f".{path.name}.lock"), f"--results {path}", print):
            results = StudyResults.open(path, recipe)
            run_study(recipe, out, results, args.programs, args.jobs)
    if any(results.has(unit) for unit in recipe.units()):
        for written, text in (
            (out / "report.html", study_page(recipe, results)),
            (path.with_suffix(".svg"), study_picture(recipe, results)),
        ):
            write_report(written, text)
            print(f"written: {written}")
    missing = [unit.name for unit in recipe.units() if not results.has(unit)]
    print(study_table(recipe, results) or f"{path}: no unit is done")
    if missing:
        print(f"not run yet: {', '.join(missing)}")
    return 0
