"""The console command ``recap-ds``: one verb per module of this folder. Parses and calls; no logic lives here."""

import sys
from collections.abc import Sequence

from recap_ds import __version__
from recap_ds.cli import (
    bench,
    checkpoints,
    collect,
    consolidate,
    doctor,
    iterate,
    labels,
    plan,
    report,
    serve,
    shards,
    study,
    weights,
)
from recap_ds.cli.errors import Parser, run_program


def build_parser() -> Parser:
    parser = Parser(prog="recap-ds", description="RECAP for vision-language-action models: data, checkpoints, exports.")
    parser.add_argument("--version", action="version", version=f"recap-ds {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    shards.add_parser(verbs)
    labels.add_parser(verbs)
    consolidate.add_parser(verbs)
    checkpoints.add_parser(verbs)
    iterate.add_parser(verbs)
    study.add_parser(verbs)
    collect.add_parser(verbs)
    serve.add_parser(verbs)
    weights.add_parser(verbs)
    doctor.add_parser(verbs)
    plan.add_parser(verbs)
    bench.add_parser(verbs)
    report.add_parser(verbs)
    return parser


def run(arguments: Sequence[str]) -> int:
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse gives "section.key=value ..." only what stands before the first flag; the rest belongs there too.
    settings = [word for word in rest if "=" in word and not word.startswith("-") and "overrides" in vars(parsed)]
    if len(settings) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings:
        parsed.overrides += settings
    return parsed.run(parsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of ``recap-ds``: 0 done, 1 findings or a failed run, 2 wrong input."""
    return run_program(run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
