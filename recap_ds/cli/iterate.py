"""``recap-ds iterate --config RECIPE``: critic, labels and policy, as often as there are new shards."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "iterate",
        help="critic, labels, policy: RECAP's iterations as one command",
        description="Run critic -> labels -> policy for every folder of shards in RECIPE, each from the pre-trained "
        "checkpoints it names. Interrupted, the same command goes on.",
        epilog="example: recap-ds iterate --config launch/recipes/iterations/metaworld.yaml "
        "--launcher 'deepspeed --num_gpus 2'",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="see launch/recipes/iterations/")
    parser.add_argument(
        "--iterations", type=_count, metavar="K", help="only the first K (default: one per folder of shards)"
    )
    parser.add_argument("--launcher", default="deepspeed", help="what starts a program (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: iterations/<the recipe's name>")
    parser.add_argument(
        "--programs", type=Path, default=Path("launch"), metavar="FOLDER", help="launch scripts (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.iterate.driver import iterate  # with torch, which takes a second
    from recap_ds.iterate.recipe import load_iteration_recipe

    recipe = load_iteration_recipe(args.config)
    policies = iterate(
        recipe, args.out or Path("iterations") / recipe.name, args.launcher, args.programs, args.iterations
    )
    print(f"done: {len(policies)} iteration(s); next: recap-ds consolidate {policies[-1]} exports/{recipe.name}")
    return 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
