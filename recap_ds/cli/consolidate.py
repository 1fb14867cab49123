"""``recap-ds consolidate CHECKPOINT OUT``: a training checkpoint becomes an export. Parses, calls and prints."""

import argparse
from pathlib import Path

from recap_ds.cli.sizes import parse_bytes
from recap_ds.errors import RunFailed

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 10**6, 10**12


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
        help="a run, a step folder, latest, best, or a folder of DeepSpeed's own ZeRO checkpoint",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="the average of training or the last step's (default: ema if kept)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is written (default: %(default)s)"
    )
    parser.add_argument("--merge", action="store_true", help="fold LoRA into the VLM's weights")
    parser.add_argument("--adapter-only", action="store_true", help="the LoRA adapter alone, in peft's format")
    parser.add_argument("--policy-only", action="store_true", help="leave out critic and target critic")
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="at most, of one of the VLM's files (default: %(default)s)"
    )
    parser.add_argument(
        "--config", type=Path, help="the recipe of a folder of DeepSpeed's own that lies in no run of recap_ds"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in OUT")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recap_ds.checkpoint.consolidate import consolidate  # torch takes a second

    max_shard_bytes = parse_bytes("--shard-size", args.shard_size, MIN_SHARD_BYTES, MAX_SHARD_BYTES)
    try:
        record = consolidate(
            args.checkpoint,
            args.out,
            weights=args.weights,
            dtype=args.dtype,
            config=args.config,
            merge=args.merge,
            adapter_only=args.adapter_only,
            policy_only=args.policy_only,
            max_shard_bytes=max_shard_bytes,
            overwrite=args.overwrite,
        )
    except OSError as error:
        raise RunFailed(f"{error.filename or f'OUT {args.out}'}: {error.strerror or error}") from error
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
