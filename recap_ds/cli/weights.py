"""``recap-ds weights parity``: published weights. Parses, calls and prints."""

import argparse
import json
import math
from pathlib import Path

TOLERANCE = 1e-4


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("weights", help="published pi0 / pi0.5 weights", description="Published weights.")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=type(parser))
    parity = verbs.add_parser(
        "parity",
        help="compare with what another implementation computed",
        description=f"Build the pi0 / pi0.5 model of DIR/config.json, load DIR/model.safetensors strictly, run the "
        f"inputs of DIR/io.npz in float32 and print the largest absolute differences from its outputs as one JSON "
        f"line. Exit code 1 where one exceeds {TOLERANCE}.",
    )
    parity.add_argument(
        "folder", metavar="DIR", type=Path, help="folder with model.safetensors, config.json and io.npz"
    )
    parity.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> int:
    from recap_ds.models.pi_parity import measure

    errors = measure(args.folder)._asdict()
    passed = all(error <= TOLERANCE for error in errors.values())
    # NaN is no JSON.
    shown = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    print(json.dumps({"max_abs_error": shown, "tolerance": TOLERANCE, "passed": passed}))
    return 0 if passed else 1
