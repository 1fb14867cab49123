"""``launch/train.py``: parse, build, call."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recap_ds.cli.errors import Parser, run_program
from recap_ds.config import PiStarRECAPConfig
from recap_ds.train.stopping import StopSignals


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train a RECAP policy under DeepSpeed. Without --config: the embedded quickstart.",
        epilog="example: deepspeed launch/train.py --deepspeed ds_configs/zero3.json "
        "--config launch/recipes/metaworld_tiny.yaml data.shards=data/mw training.batch_size=16",
    )
    # Our own flag: DeepSpeed's add_config_arguments would make it a boolean and drop the path.
    parser.add_argument("--deepspeed", metavar="JSON", required=True, help="DeepSpeed configuration, see ds_configs/")
    parser.add_argument("--config", metavar="YAML", help="recipe, see launch/recipes/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the recipe's")
    return parser


def run(arguments: Sequence[str], quickstart: Path) -> int:
    began = time.monotonic()
    parsed = build_parser().parse_intermixed_args(arguments)
    with StopSignals() as signals:
        return run_parsed(parsed, quickstart, signals, began)


def run_parsed(parsed: argparse.Namespace, quickstart: Path, signals: StopSignals, began: float) -> int:
    from recap_ds.distributed.runtime import read_rank_info
    from recap_ds.recipe import load_config
    from recap_ds.train.quickstart import ensure_quickstart_shards
    from recap_ds.train.session import plan_session

    info = read_rank_info()
    config = load_config(parsed.config or quickstart, parsed.overrides)
    own_shards = any(text.startswith("data.shards=") for text in parsed.overrides)
    if parsed.config is None and not own_shards:
        ensure_quickstart_shards(config, info)
    plan = plan_session(config, parsed.deepspeed, info)
    summary = plan.run.finished_summary()
    if summary is None:
        from recap_ds.train.program import run_training

        summary = run_training(plan, signals, began)
    elif info.is_main and (ignored := plan.run.ignored_settings(config)):
        print(
            f"note: {plan.run.path} is finished and keeps the figures it was judged by: {', '.join(ignored)} changes "
            "nothing; launch/evaluate.py judges a checkpoint by other evaluation.* settings",
            file=sys.stderr,
        )
    if info.is_main:
        print(json.dumps(summary, indent=1))
        print(f"next: {next_command(config, plan.run.path)}")
    return 0


def next_command(config: PiStarRECAPConfig, run: Path) -> str:
    """What one does with what the stage has trained."""
    if config.training.stage == "critic":
        checkpoint = run / "best" if config.data.held_out_fraction else run
        return f"deepspeed launch/label.py --checkpoint {checkpoint} --shards {config.data.shards} --tag TAG"
    return f"recap-ds consolidate {run} exports/{config.name}"


def main(arguments: Sequence[str], quickstart: Path) -> int:
    """Exit code of ``launch/train.py``; ``quickstart`` is the recipe used without --config."""
    return run_program(lambda given: run(given, quickstart), arguments)
