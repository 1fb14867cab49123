"""``launch/evaluate.py``: parse, build, call."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recap_ds.cli.errors import Parser, run_program


def build_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description="Evaluate a policy on held-out episodes of a shard folder.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="an export, a run or one of its checkpoints"
    )
    parser.add_argument("--shards", required=True, metavar="FOLDER", help="folder of shards")
    parser.add_argument("--out", metavar="JSON", help="default: evaluation_results.json in the export's folder")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="evaluation.* and data.* settings")
    return parser


def run(arguments: Sequence[str]) -> int:
    parsed = build_parser().parse_intermixed_args(arguments)
    from recap_ds.checkpoint.on_demand import export_of
    from recap_ds.distributed.runtime import read_rank_info, start_runtime, stop_runtime
    from recap_ds.errors import UsageError
    from recap_ds.evaluate import results
    from recap_ds.models.pretrained import load_pretrained
    from recap_ds.processing.normalize import Normalizer

    info = read_rank_info()
    export = export_of(parsed.checkpoint, info)
    policy, contract, tokenizer = load_pretrained(export, overrides=parsed.overrides)
    if contract is None:
        raise UsageError(f"--checkpoint {export}: was saved without a contract, so its units are not known")
    assembler, tasks = results.open_held_out(policy.config, contract, tokenizer, parsed.shards)
    out = Path(parsed.out) if parsed.out else export / results.RESULTS_NAME
    if info.is_main:
        results.check_writable(out)
    runtime = start_runtime(info)
    policy.to(runtime.device)
    normalizer = Normalizer.from_dict(contract.normalizer)
    evaluation = results.evaluate_dataset(policy, assembler, tasks, normalizer, runtime)
    if info.is_main:
        results.write_results(out, parsed.checkpoint, parsed.shards, evaluation)
        print(results.results_table(evaluation))
        print(f"written: {out}")
    stop_runtime()
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_program(run, arguments)
