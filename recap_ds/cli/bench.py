"""``recap-ds bench WHAT``: measures this machine; prints one JSON line, with the baseline of the same run."""

import argparse
import json
import sys
from pathlib import Path

from recap_ds.cli.sizes import parse_bytes, parse_count

MIN_PARAMETERS, MAX_PARAMETERS = 10**6, 10**11
MAX_REPEATS = 100
MAX_RANKS = 64


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="measure this machine", description="Each prints one JSON line.")
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    add_consolidate(benches)
    add_resume(benches)
    add_step(benches)


def add_consolidate(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "consolidate",
        help="peak memory and time of an export, beside DeepSpeed's zero_to_fp32 on the same state",
        description="Writes a made-up ZeRO-3 state of two ranks, exports it both ways, compares every tensor.",
    )
    parser.add_argument("--parameters", default="300M", metavar="N", help="of the policy (default: %(default)s)")
    parser.add_argument(
        "--shard-size", default="500MB", metavar="SIZE", help="of the VLM's files (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write meanwhile (default: the system's for temporary files)"
    )
    parser.set_defaults(run=run_consolidate)


def run_consolidate(args: argparse.Namespace) -> int:
    from recap_ds.bench.consolidate import bench_consolidate  # torch takes a second

    num_parameters = parse_count("--parameters", args.parameters, MIN_PARAMETERS, MAX_PARAMETERS)
    max_shard_bytes = parse_bytes("--shard-size", args.shard_size, 10**6, 10**12)
    print(json.dumps(bench_consolidate(num_parameters, max_shard_bytes, args.folder)))
    return 0


def add_resume(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "resume",
        help="how long a save stops training, in the foreground and in the background, and a load",
        description="Saves and loads a made-up ZeRO-3 state of one rank: 16 bytes per parameter, as in training.",
    )
    parser.add_argument("--parameters", default="100M", metavar="N", help="trainable ones (default: %(default)s)")
    parser.add_argument("--repeats", default="3", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)"
    )
    parser.set_defaults(run=run_resume)


def run_resume(args: argparse.Namespace) -> int:
    from recap_ds.bench.resume import bench_resume  # torch takes a second

    num_parameters = parse_count("--parameters", args.parameters, MIN_PARAMETERS, MAX_PARAMETERS)
    num_repeats = parse_count("--repeats", args.repeats, 1, MAX_REPEATS)
    print(json.dumps(bench_resume(num_parameters, num_repeats, args.folder)))
    return 0


def add_step(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "step",
        help="training steps under the engine beside DDP and one rank, and where their time goes",
        description="Steps of stage joint, in turns, under the engine, under torch's DDP, on every rank apart and on "
        "one rank; with a frozen VLM also those of stage policy. A table on stderr. Without data.shards it makes some.",
        epilog="example: recap-ds bench step --repeats 15 training.batch_size=128",
    )
    parser.add_argument("--config", metavar="YAML", type=Path, help="recipe (default: a small one)")
    parser.add_argument(
        "--deepspeed", metavar="JSON", default="ds_configs/zero3.json", help="see ds_configs/ (default: %(default)s)"
    )
    parser.add_argument("--ranks", default="2", metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--repeats", default="7", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the recipe's")
    parser.set_defaults(run=run_step)


def run_step(args: argparse.Namespace) -> int:
    num_ranks = parse_count("--ranks", args.ranks, 1, MAX_RANKS)
    num_repeats = parse_count("--repeats", args.repeats, 1, MAX_REPEATS)
    from recap_ds.bench.step import bench_step, table  # torch takes a second

    figures = bench_step(args.config, args.overrides, args.deepspeed, num_ranks, num_repeats)
    print("\n".join(table(figures)), file=sys.stderr)
    print(json.dumps(figures))
    return 0
