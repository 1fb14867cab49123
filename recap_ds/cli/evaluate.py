"""``launch/evaluate.py``: parse, build, call."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recap_ds.cli.errors import Parser, run_program
from recap_ds.cli.numbers import count

DEFAULT_EPISODES = 50


def build_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py",
        description="Evaluate a policy on held-out episodes of a shard folder, in an environment, or both.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="an export, a run or one of its checkpoints"
    )
    parser.add_argument("--shards", metavar="FOLDER", help="folder of shards")
    parser.add_argument("--env", metavar="ENV", help="reach, metaworld:TASK[,TASK], pusht, gym:ID or MODULE:CLASS")
    parser.add_argument(
        "--episodes",
        type=count,
        metavar="N",
        help=f"with --env (default: {DEFAULT_EPISODES})",
    )
    parser.add_argument("--compare", metavar="CHECKPOINT", help="with --env: another policy on the same episodes")
    parser.add_argument("--critic", metavar="CHECKPOINT", help="with --env: whose value films show (default: the own)")
    parser.add_argument("--out", metavar="JSON", help="films go beside it (default: in the export's folder)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="evaluation.*, env.* and data.* settings"
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    parser = build_parser()
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.shards is None and parsed.env is None:
        parser.error("give --shards, --env or both")
    for flag in ("episodes", "compare", "critic"):
        if parsed.env is None and vars(parsed)[flag] is not None:
            parser.error(f"--{flag} needs --env")
    if parsed.out and not parsed.out.endswith(".json"):
        parser.error(f"--out {parsed.out}: names the JSON file, such as {parsed.out.rstrip('/')}/results.json")
    from recap_ds.checkpoint.on_demand import export_of
    from recap_ds.distributed.runtime import read_rank_info, start_runtime, stop_runtime
    from recap_ds.errors import UsageError
    from recap_ds.evaluate import results, rollout_results, rollouts
    from recap_ds.models.pretrained import load_pretrained
    from recap_ds.processing.normalize import Normalizer

    info = read_rank_info()
    export = export_of(parsed.checkpoint, info)
    pretrained = load_pretrained(export, overrides=parsed.overrides)
    policy, contract, tokenizer = pretrained
    if contract is None:
        raise UsageError(f"--checkpoint {export}: was saved without a contract, so its units are not known")
    out = Path(parsed.out) if parsed.out else export / results.RESULTS_NAME
    held_out, job = None, None
    if parsed.shards:
        held_out = results.open_held_out(policy.config, contract, tokenizer, parsed.shards)
    if parsed.env:
        job = rollouts.open_rollouts(
            rollouts.Checkpoint(parsed.checkpoint, export),
            pretrained,
            parsed.env,
            parsed.episodes or DEFAULT_EPISODES,
            info,
            other=rollouts.Checkpoint(parsed.compare, export_of(parsed.compare, info)) if parsed.compare else None,
            critic=export_of(parsed.critic, info) if parsed.critic else None,
            overrides=parsed.overrides,
        )
    if info.is_main:
        results.check_writable(out)
    runtime = start_runtime(info, timeout_seconds=rollouts.WAIT_SECONDS)
    evaluation, played = None, None
    if held_out:
        policy.to(runtime.device)
        normalizer = Normalizer.from_dict(contract.normalizer)
        evaluation = results.evaluate_dataset(policy, *held_out, normalizer, runtime)
        if info.is_main:
            print(results.results_table(evaluation))
    if job:
        played = rollouts.play_rollouts(job, runtime, out.parent / rollouts.VIDEOS_NAME)
        if info.is_main:
            played = rollout_results.summarise_rollouts(job, played)
            rollout_results.write_eval_info(out.parent, played)
            print(rollout_results.rollout_table(played))
    if info.is_main:
        results.write_results(out, parsed.checkpoint, parsed.shards, evaluation, played)
        print(f"written: {out}")
    stop_runtime()
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_program(run, arguments)
