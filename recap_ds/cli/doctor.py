"""``recap-ds doctor``: is this machine, or this cluster, fit to train?"""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check machine, storage, shards and network before training",
        description="A page of findings, each ok, warn or fail with what to do. Exit code 1 where one failed.",
        epilog="example: recap-ds doctor --hostfile launch/hostfile --config launch/recipes/paligemma3b_full.yaml",
    )
    parser.add_argument(
        "--hostfile", metavar="FILE", help="also every machine of it, over ssh, and the network between"
    )
    parser.add_argument("--run-folder", type=Path, metavar="FOLDER", help="default: the recipe's, else runs/")
    parser.add_argument("--shards", metavar="SHARDS", help="read them (default: the recipe's data.shards)")
    parser.add_argument("--config", metavar="RECIPE", help="what is to be trained, see launch/recipes/")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.doctor.examine import examine
    from recap_ds.doctor.page import closing_line, exit_code

    findings = []
    for finding in examine(args.hostfile, args.run_folder, args.shards, args.config):
        print(finding, flush=True)
        findings.append(finding)
    print(closing_line(findings))
    return exit_code(findings)
