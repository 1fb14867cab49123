"""``recap-ds shards make | import | index | show | verify``: build, index, look into and check shard folders.

``merge``, ``split`` and ``stats`` stand in ``shards_manage.py``.
"""

import argparse
import sys
from pathlib import Path

from recap_ds.cli import shards_import, shards_manage
from recap_ds.cli.numbers import count, seed
from recap_ds.errors import UsageError

# What a verb does is imported when it runs: torch takes seconds, and --help should not.


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("shards", help="build, import, index, show, verify, merge and split shard folders")
    verbs = parser.add_subparsers(dest="shards_verb", required=True, metavar="VERB")

    make = verbs.add_parser("make", help="write a small shard folder of the built-in reach task")
    make.add_argument("out", type=Path, metavar="OUT")
    make.add_argument("--episodes", type=count, default=24, help="demo and auto episodes each; half as many corrected")
    make.add_argument("--seed", type=seed, default=0)
    make.add_argument("--chunk-size", type=count, default=10, help="frames of action per sample, and of the TD window")
    make.set_defaults(run=run_make)

    shards_import.add_parser(verbs)

    index = verbs.add_parser("index", help="rebuild indices and manifest of tars that are there")
    index.add_argument("folder", type=Path, metavar="FOLDER")
    index.add_argument("--jobs", type=count, default=1)
    index.set_defaults(run=run_index)

    show = verbs.add_parser("show", help="counts, outcomes, statistics and a contact sheet of pictures")
    show.add_argument("shards", metavar="SHARDS", help="a folder, or the address of a remote one")
    show.add_argument(
        "--out", type=Path, metavar="PNG", help="contact sheet, of local shards (default: SHARDS/contact_sheet.png)"
    )
    _add_cache_folder(show)
    show.set_defaults(run=run_show)

    verify = verbs.add_parser("verify", help="read every byte; exit 1 with a line per fault")
    verify.add_argument("shards", metavar="SHARDS", help="a folder, or the address of a remote one")
    verify.add_argument("--jobs", type=count, default=1)
    _add_cache_folder(verify)
    verify.set_defaults(run=run_verify)

    shards_manage.add_parser(verbs)


def _add_cache_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-folder", metavar="FOLDER", help="where what is remote is kept (as data.cache_folder)")


def run_make(args: argparse.Namespace) -> int:
    from recap_ds.envs.scripted import write_reach_shards

    manifest = write_reach_shards(
        args.out,
        num_demo=args.episodes,
        num_auto=args.episodes,
        num_intervention=max(1, args.episodes // 2),
        seed=args.seed,
        chunk_size=args.chunk_size,
    )
    print(f"{args.out}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def run_index(args: argparse.Namespace) -> int:
    from recap_ds.data.rebuild import rebuild

    manifest = rebuild(args.folder, jobs=args.jobs)
    print(f"{args.folder}: indexed {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def run_show(args: argparse.Namespace) -> int:
    from recap_ds.config import DataConfig
    from recap_ds.data.cache import ShardCache
    from recap_ds.data.remote import is_remote
    from recap_ds.data.remote_set import RemoteSet
    from recap_ds.data.show import contact_sheet, describe

    if is_remote(args.shards):
        if args.out is not None:
            raise UsageError(f"--out {args.out}: pictures are drawn of local shards only")
        remote = RemoteSet.open(args.shards, ShardCache.of(DataConfig(cache_folder=args.cache_folder)))
        print(describe(remote.folder, remote.origin.place))
        return 0
    print(describe(args.shards))
    out = args.out or Path(args.shards) / "contact_sheet.png"
    try:
        contact_sheet(args.shards).save(out, format="PNG")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"\n{out}: contact sheet")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from recap_ds.config import DataConfig
    from recap_ds.data.cache import ShardCache
    from recap_ds.data.verify import verify_shards

    cache = ShardCache.of(DataConfig(cache_folder=args.cache_folder))
    findings = verify_shards(args.shards, jobs=args.jobs, cache=cache)
    for finding in findings:
        print(finding, file=sys.stderr)
    print(f"{args.shards}: {f'{len(findings)} faults' if findings else 'sound'}")
    return 1 if findings else 0
