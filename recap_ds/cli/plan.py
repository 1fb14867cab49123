"""``recap-ds plan``: what a recipe needs before GPUs are rented. Parses, calls and prints."""

import argparse

from recap_ds.errors import UsageError
from recap_ds.plan.hardware import GPUS, GPUS_PER_NODE

MAX_GPUS, MAX_MEMORY_GIB = 4096, 1024.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory, files and an estimate of time before a run",
        description="Parameters, memory per GPU, batch, files, traffic and an estimate of step time of a recipe, on 1, "
        "8, 16, 32 and --gpus GPUs. The policy is built at its true size without memory: no GPU, no download.",
        epilog="example: recap-ds plan --config launch/recipes/paligemma3b_lora.yaml --gpus 8 --gpu-memory 80",
    )
    parser.add_argument("--config", metavar="YAML", required=True, help="recipe, see launch/recipes/")
    parser.add_argument(
        "--deepspeed", metavar="JSON", default="ds_configs/zero3.json", help="see ds_configs/ (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="ranks of the run (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=GPUS_PER_NODE, metavar="N", help="of them in a node (default: %(default)s)"
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="a100-80", help="default: %(default)s")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="default: what the --gpu has")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the recipe's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for flag, value in (("--gpus", args.gpus), ("--gpus-per-node", args.gpus_per_node)):
        if not 1 <= value <= MAX_GPUS:
            raise UsageError(f"{flag} {value}: give a number from 1 to {MAX_GPUS}")
    gpu = GPUS[args.gpu]
    memory_gib = gpu.memory_gib if args.gpu_memory is None else args.gpu_memory
    if not 1 <= memory_gib <= MAX_MEMORY_GIB:  # nan is in no range
        raise UsageError(f"--gpu-memory {memory_gib}: give GiB from 1 to {MAX_MEMORY_GIB:g}")
    from recap_ds.plan.report import Cluster, plan_lines  # torch and transformers take seconds
    from recap_ds.recipe import load_config

    config = load_config(args.config, args.overrides)
    for line in plan_lines(config, args.deepspeed, Cluster(args.gpus, args.gpus_per_node, gpu, memory_gib)):
        print(line, flush=True)
    return 0
