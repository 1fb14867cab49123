"""``recap-ds checkpoints list | verify | prune RUN``: what a run has saved, whether it is whole, what may go."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recap_ds.checkpoint.inventory import CheckpointEntry

# What a verb does is imported when it runs: torch takes seconds, and --help should not.


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("checkpoints", help="list, verify and prune the checkpoints of a run")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    show = verbs.add_parser("list", help="step, size, when, ranks, marks, and whether every file is there in its size")
    show.add_argument("run_folder", type=Path, metavar="RUN")
    show.set_defaults(run=run_list)

    verify = verbs.add_parser("verify", help="read every byte and compare checksums; exit 1 where one is not whole")
    verify.add_argument("run_folder", type=Path, metavar="RUN")
    verify.set_defaults(run=run_verify)

    prune = verbs.add_parser(
        "prune",
        help="remove what the run's own retention rule, or --keep-last, no longer keeps",
        description="Says what would be removed; --yes removes it. latest, best and the multiples of the run's "
        "checkpoint.keep_every_steps stay. Only whole checkpoints count, so every byte is read first.",
    )
    prune.add_argument("run_folder", type=Path, metavar="RUN")
    prune.add_argument("--keep-last", type=_count, metavar="N", help="instead of the run's checkpoint.keep_last")
    prune.add_argument("--damaged", action="store_true", help="remove those that are not whole, too")
    prune.add_argument("--yes", action="store_true", help="really remove")
    prune.set_defaults(run=run_prune)


def run_list(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.inventory import list_checkpoints

    print(f"{'step':>10}  {'size':>9}  {'saved (UTC)':<19}  {'ranks':>5}  {'marks':<11}  state")
    for entry in list_checkpoints(args.run_folder):
        print(_line(entry))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.inventory import base_problems, list_checkpoints

    entries = list_checkpoints(args.run_folder, with_checksums=True)
    problems = [f"{entry.folder}: {problem}" for entry in entries for problem in entry.problems]
    problems += base_problems(args.run_folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    num_whole = sum(not entry.problems for entry in entries)
    print(f"{args.run_folder}: {num_whole} of {len(entries)} checkpoints are whole")
    return 1 if problems else 0


def run_prune(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.inventory import checkpoints_of, prune
    from recap_ds.checkpoint.layout import CONFIG_NAME
    from recap_ds.recipe import load_config

    keep = load_config(checkpoints_of(args.run_folder).parent / CONFIG_NAME).checkpoint
    if args.keep_last is not None:
        keep = keep.model_copy(update={"keep_last": args.keep_last})
    pruned = prune(args.run_folder, keep, with_damaged=args.damaged, dry_run=not args.yes)
    for entry in pruned.removed:
        print(f"{'removed' if args.yes else 'would remove'} {entry.folder} ({_size(entry.bytes)})")
    for entry in pruned.damaged:
        print(f"left alone, as it is not whole: {entry.folder} ({entry.problems[0]}); --damaged removes it")
    total = _size(sum(entry.bytes for entry in pruned.removed))
    ending = "" if args.yes or not pruned.removed else "; --yes does it"
    print(f"{len(pruned.removed)} {'removed' if args.yes else 'to remove'}, {total}; {len(pruned.kept)} stay{ending}")
    return 0


def _line(entry: "CheckpointEntry") -> str:
    saved = "?" if entry.saved_at is None else entry.saved_at[:19].replace("T", " ")
    ranks, marks = "?" if entry.world is None else entry.world, " ".join(entry.marks)
    state = entry.problems[0] if entry.problems else "whole"
    return f"{entry.step:>10}  {_size(entry.bytes):>9}  {saved:<19}  {ranks:>5}  {marks:<11}  {state}"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
