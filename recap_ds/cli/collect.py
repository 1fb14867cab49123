"""``recap-ds collect``: episodes from an environment into a shard folder. Parses, calls and prints."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recap_ds.cli.numbers import count, seed
from recap_ds.errors import RunStopped, UsageError

if TYPE_CHECKING:
    from recap_ds.collect.job import CollectJob, Kind
    from recap_ds.collect.tally import Tally


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "collect",
        help="play a policy, corrections and demonstrations in an environment into shards",
        description="Play episodes and write them as shards: the policy's (auto), the policy's with corrections by the "
        "scripted expert or by you (intervention), and the expert's own (demo). Without --checkpoint a mediocre expert "
        "(collect.expert_*) stands in for the policy. Interrupted, the same command goes on.",
    )
    parser.add_argument("--env", required=True, metavar="ENV", help="reach, metaworld:TASK[,TASK], pusht, gym:ID, ...")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="shard folder, new or not")
    parser.add_argument("--checkpoint", metavar="CHECKPOINT", help="an export, a run or one of its checkpoints")
    parser.add_argument("--episodes", type=count, metavar="N", help="episodes of the policy")
    parser.add_argument("--corrections", type=count, metavar="N", help="episodes in which the expert corrects it")
    parser.add_argument("--keyboard", action="store_true", help="you correct it, in a window: of --corrections alone")
    parser.add_argument("--demos", type=count, metavar="N", help="episodes of the expert")
    parser.add_argument("--critic", metavar="CHECKPOINT", help="with collect.progress=value (default: its own)")
    parser.add_argument("--name", help="of the data sets (default: the folder's)")
    parser.add_argument("--seed", type=seed, help="of scenes and noise (default: from the name)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="collect.*, env.* and evaluation.* settings"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # As Ctrl-C: what is finished is written before the process ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _collect(args)
    except KeyboardInterrupt:
        print(f"collection into {args.out} was stopped; the same command goes on from there", file=sys.stderr)
        raise RunStopped(f"collection into {args.out}") from None


def _collect(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.on_demand import export_of
    from recap_ds.collect.job import AUTO, DEMO, INTERVENTION, open_collection
    from recap_ds.collect.run import collect
    from recap_ds.distributed.runtime import RankInfo, start_runtime, stop_runtime
    from recap_ds.models.pretrained import load_pretrained
    from recap_ds.recipe import load_config

    wanted = {AUTO: args.episodes, INTERVENTION: args.corrections, DEMO: args.demos}
    goals = {kind: number for kind, number in wanted.items() if number is not None}
    if not goals:
        raise UsageError("recap-ds collect: give --episodes, --corrections or --demos; see --help")
    alone = RankInfo()
    export = export_of(args.checkpoint, alone) if args.checkpoint else None
    policy = load_pretrained(export, overrides=args.overrides) if export else None
    job = open_collection(
        args.out,
        args.env,
        goals,
        policy.policy.config if policy else load_config(None, args.overrides),
        policy=policy,
        checkpoint=args.checkpoint,
        export=export,
        critic=export_of(args.critic, alone) if args.critic else None,
        name=args.name,
        seed=args.seed,
        corrector="keyboard" if args.keyboard else "script",
    )
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    runtime = start_runtime(alone)
    tallies = collect(job, runtime.device, alone.local_world, lambda line: print(line, flush=True))
    stop_runtime()
    print("\n".join(line for kind in goals for line in _told(job, kind, tallies[job.dataset(kind)])))
    if any(tally.num_episodes for tally in tallies.values()):
        print(f"next: recap-ds shards show {args.out}")
    return 0


def _told(job: "CollectJob", kind: "Kind", tally: "Tally") -> list[str]:
    """A data set in a line, and what is probably not meant.

    A rate has an interval where it says how often somebody succeeds: not for demonstrations, which were selected by it,
    and not for corrections, where a policy and whoever corrects it succeed together.
    """
    from recap_ds.evaluate.intervals import wilson_interval

    dataset = job.dataset(kind)
    if tally.num_episodes == 0:
        return [f"{dataset}: no episode was finished"]
    if kind.mode == "expert":
        return [f"{dataset}: {tally.num_episodes} episodes, all successful, in {tally.num_tries} tries of the expert"]
    if kind.mode == "policy":
        low, high = wilson_interval(tally.num_successes, tally.num_episodes)
        rate = tally.num_successes / tally.num_episodes
        return [f"{dataset}: {tally.num_episodes} episodes, success {rate:.2f} [{low:.2f}, {high:.2f}]"]
    lines = [
        f"{dataset}: {tally.num_episodes} episodes, {tally.num_takeovers} takeovers, {tally.num_human_frames} of "
        f"{tally.num_frames} frames corrected; {tally.num_successes} ended in success, corrections included"
    ]
    if tally.num_takeovers == 0:
        how = "the key is t" if job.corrector == "keyboard" else "collect.stall_frames and stall_margin say when"
        lines.append(f"note: {dataset}: nobody took over, so it holds the policy's own frames alone (auto); {how}")
    return lines
