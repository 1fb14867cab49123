"""``recap-ds iterate --config RECIPE``: critic, labels and policy, as often as there are new shards; in a simulator
from collection to evaluation, as often as you like."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "iterate",
        help="critic, labels, policy: RECAP's iterations as one command",
        description="Run critic -> labels -> policy for every folder of shards in RECIPE, each from the pre-trained "
        "checkpoints it names; with env:, collect: and evaluate: in RECIPE, iterations beyond these folders begin with "
        "episodes of the policy so far, and each ends with rollouts. Interrupted, the same command goes on.",
        epilog="example: recap-ds iterate --config launch/recipes/iterations/metaworld.yaml "
        "--launcher 'deepspeed --num_gpus 2'",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="see launch/recipes/iterations/")
    parser.add_argument(
        "--iterations", type=_count, metavar="K", help="the first K (default: one per folder of shards)"
    )
    parser.add_argument("--launcher", default="deepspeed", help="what starts a program (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: iterations/<the recipe's name>")
    parser.add_argument(
        "--programs", type=Path, default=Path("launch"), metavar="FOLDER", help="launch scripts (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.iterate.driver import iterate  # with torch, which takes a second
    from recap_ds.iterate.folder import RESULTS_NAME
    from recap_ds.iterate.recipe import load_iteration_recipe
    from recap_ds.iterate.table import iterations_table

    recipe = load_iteration_recipe(args.config)
    out = args.out or Path("iterations") / recipe.name
    policies = iterate(recipe, out, args.launcher, args.programs, args.iterations)
    if recipe.evaluate is not None:
        results = [policy.parent / RESULTS_NAME for policy in policies]
        print(iterations_table(results))
        _write_report(recipe.name, out, policies, results)
    print(f"done: {len(policies)} iteration(s); next: recap-ds consolidate {policies[-1]} exports/{recipe.name}")
    return 0


def _write_report(name: str, out: Path, policies: list[Path], results: list[Path]) -> None:
    """The last iteration's jobs, and what every iteration's policy does."""
    from recap_ds.report.build import REPORT_NAME, build_report, find_sources, write_report

    page = out / REPORT_NAME
    sources = find_sources([policies[-1].parent, *results])
    write_report(page, build_report(sources, page, f"Iterations {name}").page)
    print(f"written: {page}")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
