"""``recap-ds labels rethreshold | show``: other labels of the same values, and a look at those there are."""

import argparse
from pathlib import Path

from recap_ds.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("labels", help="make labels anew without inference, look at them")
    verbs = parser.add_subparsers(dest="labels_verb", required=True, metavar="VERB")

    rethreshold = verbs.add_parser(
        "rethreshold", help="labels with other settings from the same values: seconds, no model"
    )
    rethreshold.add_argument("shards", type=Path, metavar="SHARDS")
    rethreshold.add_argument("--tag", required=True, help="labels whose values and settings to start from")
    rethreshold.add_argument("--new-tag", required=True, help="name of the new labels")
    rethreshold.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="recap.positive_fraction, recap.demos, and of label.* all but batch_size",
    )
    rethreshold.set_defaults(run=run_rethreshold)

    show = verbs.add_parser("show", help="counts per task, values along episodes, advantages, extreme frames")
    show.add_argument("shards", type=Path, metavar="SHARDS")
    show.add_argument("--tag", required=True)
    show.add_argument("--out", type=Path, metavar="FOLDER", help="of pictures (default: pictures/ beside the labels)")
    show.set_defaults(run=run_show)


def run_rethreshold(args: argparse.Namespace) -> int:
    from recap_ds.data.shard_set import ShardSet
    from recap_ds.label.job import rethreshold
    from recap_ds.label.table import label_table

    rethreshold(args.shards, args.tag, args.new_tag, args.overrides)
    print(label_table(ShardSet.open(args.shards), args.new_tag))
    return 0


def run_show(args: argparse.Namespace) -> int:
    from recap_ds.data.label_records import check_tag
    from recap_ds.data.labels import labels_folder
    from recap_ds.data.shard_set import ShardSet
    from recap_ds.label.show import draw_labels
    from recap_ds.label.table import label_table

    check_tag(args.tag, "--tag")
    shard_set = ShardSet.open(args.shards)
    print(label_table(shard_set, args.tag))
    out = args.out or labels_folder(args.shards, args.tag) / "pictures"
    try:
        drawn = draw_labels(shard_set, args.tag, out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    for path in drawn:
        print(path)
    return 0
