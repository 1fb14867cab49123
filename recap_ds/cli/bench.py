"""``recap-ds bench WHAT``: measures this machine; prints one JSON line, with the baseline of the same run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recap_ds.cli.sizes import parse_bytes, parse_count

MIN_PARAMETERS, MAX_PARAMETERS = 10**6, 10**11
MAX_REPEATS = 100
MAX_RANKS = 64
MAX_WORKERS = 64
MAX_BATCH = 4096


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="measure this machine", description="Each prints one JSON line.")
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    add_consolidate(benches)
    add_resume(benches)
    add_step(benches)
    add_loader(benches)
    add_sample(benches)


def add_consolidate(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "consolidate",
        help="peak memory and time of an export, beside DeepSpeed's zero_to_fp32 on the same state",
        description="Writes a made-up ZeRO-3 state of two ranks, exports it both ways, compares every tensor.",
    )
    parser.add_argument("--parameters", default="300M", metavar="N", help="of the policy (default: %(default)s)")
    parser.add_argument(
        "--shard-size", default="500MB", metavar="SIZE", help="of the VLM's files (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write meanwhile (default: the system's for temporary files)"
    )
    parser.set_defaults(run=run_consolidate)


def run_consolidate(args: argparse.Namespace) -> int:
    from recap_ds.bench.consolidate import bench_consolidate  # torch takes a second

    num_parameters = parse_count("--parameters", args.parameters, MIN_PARAMETERS, MAX_PARAMETERS)
    max_shard_bytes = parse_bytes("--shard-size", args.shard_size, 10**6, 10**12)
    print(json.dumps(bench_consolidate(num_parameters, max_shard_bytes, args.folder)))
    return 0


def add_resume(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "resume",
        help="how long a save stops training, in the foreground and in the background, and a load",
        description="Saves and loads a made-up ZeRO-3 state of one rank: 16 bytes per parameter, as in training.",
    )
    parser.add_argument("--parameters", default="100M", metavar="N", help="trainable ones (default: %(default)s)")
    parser.add_argument("--repeats", default="3", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)"
    )
    parser.set_defaults(run=run_resume)


def run_resume(args: argparse.Namespace) -> int:
    from recap_ds.bench.resume import bench_resume  # torch takes a second

    num_parameters = parse_count("--parameters", args.parameters, MIN_PARAMETERS, MAX_PARAMETERS)
    num_repeats = parse_count("--repeats", args.repeats, 1, MAX_REPEATS)
    print(json.dumps(bench_resume(num_parameters, num_repeats, args.folder)))
    return 0


def add_step(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "step",
        help="training steps under the engine beside DDP and one rank, and where their time goes",
        description="Steps of stage joint, in turns, under the engine, under torch's DDP, on every rank apart and on "
        "one rank; with a frozen VLM also those of stage policy. A table on stderr. Without data.shards it makes some.",
        epilog="example: recap-ds bench step --repeats 15 training.batch_size=128",
    )
    parser.add_argument("--config", metavar="YAML", type=Path, help="recipe (default: a small one)")
    parser.add_argument("--expert", choices=("dit_cross", "pi_joint"), help="of the small one (default: dit_cross)")
    parser.add_argument(
        "--deepspeed", metavar="JSON", default="ds_configs/zero3.json", help="see ds_configs/ (default: %(default)s)"
    )
    parser.add_argument("--ranks", default="2", metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--repeats", default="7", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the recipe's")
    parser.set_defaults(run=run_step)


def run_step(args: argparse.Namespace) -> int:
    num_ranks = parse_count("--ranks", args.ranks, 1, MAX_RANKS)
    num_repeats = parse_count("--repeats", args.repeats, 1, MAX_REPEATS)
    from recap_ds.bench.step import bench_step, table  # torch takes a second

    figures = bench_step(args.config, args.overrides, args.deepspeed, num_ranks, num_repeats, args.expert)
    return show(figures, table(figures))


def add_loader(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "loader",
        help="samples per second beside webdataset's plain pipeline; first batch, memory and bytes of a large set",
        description="Both loaders in turns on the same shards, with the same decoding; the time to the first batch at "
        "step 0 and 1,000,000; memory of a worker for an index of many samples; what a node of four reads per epoch "
        "with one and with four lanes. A table on stderr.",
    )
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="(default: some of the built-in task are made)")
    parser.add_argument(
        "--image-size", default="224", metavar="PX", help="of shards that are made (default: %(default)s)"
    )
    parser.add_argument("--batch", default="32", metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--workers", default="2", metavar="N", help="of each loader (default: %(default)s)")
    parser.add_argument("--batches", default="30", metavar="N", help="in each round (default: %(default)s)")
    parser.add_argument("--repeats", default="5", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument("--index-samples", default="10M", metavar="N", help="of the large index (default: %(default)s)")
    parser.set_defaults(run=run_loader)


def run_loader(args: argparse.Namespace) -> int:
    settings = {
        "shards": args.shards,
        "image_size": parse_count("--image-size", args.image_size, 16, 4096),
        "batch_size": parse_count("--batch", args.batch, 1, MAX_BATCH),
        "num_workers": parse_count("--workers", args.workers, 1, MAX_WORKERS),
        "num_batches": parse_count("--batches", args.batches, 1, 10**6),
        "num_repeats": parse_count("--repeats", args.repeats, 1, MAX_REPEATS),
        "num_index_samples": parse_count("--index-samples", args.index_samples, 10**5, 10**9),
    }
    from recap_ds.bench.loader import Settings, bench_loader, table  # torch takes a second

    figures = bench_loader(Settings(**settings))
    return show(figures, table(figures))


def add_sample(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "sample",
        help="what a chunk of actions costs, guided and not, cached and not, and what a server gives its clients",
        description="PaliGemma's and the expert's true widths with a few layers of random weights. A table on stderr.",
        epilog="example, small: recap-ds bench sample --shrink 8 --cameras 1 --clients 1,4",
    )
    parser.add_argument("--expert", choices=("dit_cross", "pi_joint"), default="dit_cross", help="default: %(default)s")
    parser.add_argument("--layers", default="2", metavar="N", help="of each tower (default: %(default)s)")
    parser.add_argument("--shrink", default="1", metavar="N", help="divide widths by 2, 4 or 8 (default: %(default)s)")
    parser.add_argument("--cameras", default="3", metavar="N", help="of 224 px (default: %(default)s)")
    parser.add_argument("--chunk-size", default="50", metavar="N", help="actions (default: %(default)s)")
    parser.add_argument("--steps", default="10", metavar="N", help="of denoising (default: %(default)s)")
    parser.add_argument("--repeats", default="5", metavar="N", help="medians over so many (default: %(default)s)")
    parser.add_argument("--clients", default="1,4,16", metavar="N,N", help="at a time (default: %(default)s)")
    parser.add_argument("--requests", default="4", metavar="N", help="of each client (default: %(default)s)")
    parser.add_argument("--max-batch", default="8", metavar="N", help="as of recap-ds serve (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: an accelerator, if there is one)")
    parser.set_defaults(run=run_sample)


def run_sample(args: argparse.Namespace) -> int:
    def small(flag: str, text: str, most: int = 1000) -> int:
        return parse_count(flag, text, 1, most)

    numbers = {
        "num_layers": small("--layers", args.layers),
        "shrink": small("--shrink", args.shrink),
        "num_cameras": small("--cameras", args.cameras),
        "chunk_size": small("--chunk-size", args.chunk_size),
        "num_steps": small("--steps", args.steps),
    }
    num_repeats, num_requests = small("--repeats", args.repeats), small("--requests", args.requests)
    clients = [small("--clients", each) for each in args.clients.split(",")]
    max_batch = small("--max-batch", args.max_batch)

    from recap_ds.serve.packages import require_packages

    require_packages("recap-ds bench sample")
    from recap_ds.bench.made_policy import Sizes  # torch takes a second
    from recap_ds.bench.sample import bench_sample, table

    sizes = Sizes(expert=args.expert, **numbers)
    figures = bench_sample(sizes, num_repeats, clients, num_requests, max_batch, args.device)
    return show(figures, table(figures))


def show(figures: dict[str, Any], table: list[str]) -> int:
    """The table for people on stderr; what programs read is alone on stdout."""
    print("\n".join(table), file=sys.stderr)
    print(json.dumps(figures))
    return 0
