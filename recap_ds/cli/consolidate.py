"""``recap-ds consolidate CHECKPOINT OUT``: a training checkpoint becomes an export. Parses, calls and prints."""

import argparse
from pathlib import Path

from recap_ds.errors import RunFailed, UsageError

GIB = 2**30
MIN_SHARD_GIB, MAX_SHARD_GIB = 0.001, 1024.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "consolidate",
        help="turn a checkpoint into an export",
        description="Write CHECKPOINT as an export: safetensors, a VLM that transformers loads, the recipe and the "
        "robot's contract. Works from any number of ranks, in one process, without DeepSpeed.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run, a step folder, latest, best, or a folder of DeepSpeed's own",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="the average of training or the last step's (default: ema if kept)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is written (default: %(default)s)"
    )
    parser.add_argument("--merge-adapters", action="store_true", help="fold LoRA into the VLM's weights")
    parser.add_argument("--adapter-only", action="store_true", help="the LoRA adapter alone, in peft's format")
    parser.add_argument("--no-critics", action="store_true", help="leave out critic and target critic")
    parser.add_argument(
        "--max-shard-gib", type=float, default=5.0, metavar="GIB", help="size of the VLM's files (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in OUT")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.consolidate import consolidate  # torch takes a second

    if not MIN_SHARD_GIB <= args.max_shard_gib <= MAX_SHARD_GIB:  # nan is in no range
        raise UsageError(
            f"--max-shard-gib {args.max_shard_gib}: give a size from {MIN_SHARD_GIB:g} to {MAX_SHARD_GIB:g} (GiB)"
        )
    try:
        record = consolidate(
            args.checkpoint,
            args.out,
            weights=args.weights,
            dtype=args.dtype,
            merge_adapters=args.merge_adapters,
            adapter_only=args.adapter_only,
            include_critics=not args.no_critics,
            max_shard_bytes=int(args.max_shard_gib * GIB),
            overwrite=args.overwrite,
        )
    except OSError as error:
        raise RunFailed(f"OUT {args.out}: {error.strerror or error} ({error.filename or 'while writing'})") from error
    source = record.provenance
    print(f"{source.run} at step {source.step}: {source.weights} weights in {record.dtype}, adapter: {record.adapter}")
    for name, file in record.files.items():
        print(f"{file.bytes:>16,}  {name}")
    print(
        f"wrote {sum(file.bytes for file in record.files.values()):,} bytes in {len(record.files)} files to {args.out}"
    )
    if record.vlm_is_plain_transformers is False:
        print("vlm/ has the convolutional stem of the tiny VLM: recap_ds loads it, transformers does not")
    return 0
