"""``recap-ds weights import | export | parity``: published weights. Parses, calls and prints."""

import argparse
import json
import math
from pathlib import Path

from recap_ds.errors import RunFailed

TOLERANCE = 1e-4


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("weights", help="published pi0 / pi0.5 weights", description="Published weights.")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=type(parser))
    _add_import(verbs)
    _add_export(verbs)
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


def _add_import(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "import",
        help="published weights -> an export that training.start_from takes",
        description="Read pi0 or pi0.5 in LeRobot's or openpi's (PyTorch) safetensors, or PaliGemma in transformers', "
        "account for every tensor and write an export. Its tokenizer is that of PATH, or of model.vlm_model_name "
        "(default: google/paligemma-3b-pt-224); a local folder's is copied, 'tiny' reads bytes.",
    )
    parser.add_argument("path", metavar="PATH", help="a folder, a .safetensors file, or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the recipe in the export")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in OUT")
    parser.set_defaults(run=_import)


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "export",
        help="an export -> a folder that others load",
        description="Write EXPORT, of a policy with model.action_expert=pi_joint, as LeRobot's policy folder: weights "
        "(LoRA merged), config.json and processors. What LeRobot does not know, the advantage, is folded into them.",
    )
    parser.add_argument("export", metavar="EXPORT", type=Path, help="what import or recap-ds consolidate wrote")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder to write")
    parser.add_argument("--format", choices=("lerobot",), required=True, help="whose format")
    parser.add_argument(
        "--advantage",
        choices=("positive", "negative", "none"),
        default="positive",
        help="what the policy is told there, always (default: %(default)s)",
    )
    parser.set_defaults(run=_export)


def _import(args: argparse.Namespace) -> int:
    from recap_ds.weights.importer import import_weights

    try:
        imported = import_weights(args.path, args.out, args.overrides, overwrite=args.overwrite)
    except OSError as error:
        raise RunFailed(f"{error.filename or f'OUT {args.out}'}: {error.strerror or error}") from error
    print(f"{imported.kind} in {imported.form} form")
    for group in imported.groups:
        print(f"{group.num_parameters:>15,}  {'/'.join(group.dtypes):<9} {group.num_tensors:>4} tensors  {group.what}")
    print(f"{sum(group.num_parameters for group in imported.groups):>15,}  in all; none missing, none unknown")
    print(f"wrote {sum(file.bytes for file in imported.record.files.values()):,} bytes to {args.out}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from recap_ds.weights.lerobot import export_lerobot

    try:
        exported = export_lerobot(args.export, args.out, args.advantage)
    except OSError as error:
        raise RunFailed(f"{error.filename or f'OUT {args.out}'}: {error.strerror or error}") from error
    for name, num_bytes in exported.files.items():
        print(f"{num_bytes:>16,}  {name}")
    print(f"wrote {sum(exported.files.values()):,} bytes to {args.out}")
    if not exported.fits_lerobot:
        print(
            "LeRobot builds the sizes of gemma_2b and gemma_300m alone; this policy has others: it will not load there"
        )
    return 0


def _parity(args: argparse.Namespace) -> int:
    from recap_ds.weights.parity import measure

    errors = measure(args.folder)._asdict()
    passed = all(error <= TOLERANCE for error in errors.values())
    # NaN is no JSON.
    shown = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    print(json.dumps({"max_abs_error": shown, "tolerance": TOLERANCE, "passed": passed}))
    return 0 if passed else 1
