"""``launch/label.py``: parse, build, call."""

import argparse
from collections.abc import Sequence

from recap_ds.cli.errors import Parser, run_program


def build_parser() -> Parser:
    parser = Parser(
        prog="label.py",
        description="Value and advantage labels of every sample, from a trained critic, as files beside the shards. "
        "Interrupted, the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="an export with critics, a run or one of its steps"
    )
    parser.add_argument("--shards", required=True, metavar="FOLDER", help="folder of shards")
    parser.add_argument("--tag", required=True, help="name of these labels, as data.labels is to give it")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="label.*, recap.positive_fraction, recap.demos",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    parsed = build_parser().parse_intermixed_args(arguments)
    from recap_ds.checkpoint.on_demand import export_of
    from recap_ds.distributed.runtime import read_rank_info, start_runtime, stop_runtime
    from recap_ds.label.job import WAIT_SECONDS, finished_labels, label_shards, open_label_job
    from recap_ds.label.table import label_table

    info = read_rank_info()
    export = export_of(parsed.checkpoint, info)
    job = open_label_job(export, parsed.shards, parsed.tag, parsed.overrides)
    finished_labels(job)  # labels of another job are refused before ranks meet
    runtime = start_runtime(info, timeout_seconds=WAIT_SECONDS)
    label_shards(job, runtime, report=lambda line: print(line, flush=True) if info.is_main else None)
    stop_runtime()
    if info.is_main:
        print(label_table(job.shard_set, parsed.tag))
        print(f"next: recap-ds labels show {parsed.shards} --tag {parsed.tag}")
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_program(run, arguments)
