"""``recap-ds shards merge | split | stats``: shard folders put together, taken apart and measured.

Parses, builds and calls; the work is in ``data/merge.py``, ``data/divide.py`` and ``data/group_stats.py``.
"""

import argparse
import json
import sys
from pathlib import Path

from recap_ds.cli.numbers import count, fraction
from recap_ds.errors import UsageError

SPLITS = ("source", "dataset", "task", "outcome", "held-out")
GROUPINGS = ("source", "dataset", "task")


def add_parser(verbs: argparse._SubParsersAction) -> None:
    merge = verbs.add_parser("merge", help="copy the shards of several folders into one")
    merge.add_argument("folders", type=Path, nargs="+", metavar="SRC", help="folders of one form; left as they are")
    merge.add_argument("out", type=Path, metavar="OUT", help="new, or with shards that the others join")
    merge.set_defaults(run=run_merge)

    split = verbs.add_parser("split", help="copy the samples of one folder into several")
    split.add_argument("folder", type=Path, metavar="SRC")
    split.add_argument("out", type=Path, metavar="OUT", help="each part becomes a folder in it")
    split.add_argument(
        "--by", choices=SPLITS, required=True, help="held-out: the very episodes that training holds out"
    )
    split.add_argument(
        "--held-out-fraction", type=fraction, metavar="F", help="data.held_out_fraction of the training meant"
    )
    split.set_defaults(run=run_split)

    stats = verbs.add_parser("stats", help="statistics of the samples; exit 1 where the manifest's are others")
    stats.add_argument("folder", type=Path, metavar="FOLDER")
    stats.add_argument("--by", choices=GROUPINGS, default="source", help="default: %(default)s")
    stats.add_argument("--out", type=Path, metavar="JSON", help="write them, under LeRobot's names, to this file")
    stats.add_argument("--jobs", type=count, default=1)
    stats.set_defaults(run=run_stats)


def run_merge(args: argparse.Namespace) -> int:
    from recap_ds.data.merge import merge_shards

    manifest = merge_shards(args.folders, args.out)
    print(f"{args.out}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def run_split(args: argparse.Namespace) -> int:
    from recap_ds.data.divide import split_shards

    if (args.by == "held-out") != (args.held_out_fraction is not None):
        raise UsageError("--held-out-fraction F belongs to --by held-out; give both or neither")
    parts = split_shards(args.folder, args.out, args.by, args.held_out_fraction or 0.0)
    for name, (place, manifest) in parts.items():
        print(f"{place}: {name}, {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    from recap_ds.data.group_stats import describe_statistics, disagreements, group_statistics, lerobot_statistics
    from recap_ds.files.atomic import write_file

    groups = group_statistics(args.folder, args.by, args.jobs)
    print(describe_statistics(groups))
    if args.out is not None:
        try:
            write_file(args.out, (json.dumps(lerobot_statistics(groups), indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    by_source = groups if args.by == "source" else group_statistics(args.folder, "source", args.jobs)
    wrong = disagreements(args.folder, by_source)
    for line in wrong:
        print(f"{line}; mend it with 'recap-ds shards index {args.folder}'", file=sys.stderr)
    return 1 if wrong else 0
