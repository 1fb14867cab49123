"""Evaluate: ``deepspeed launch/evaluate.py --checkpoint EXPORT_OR_RUN --shards FOLDER [section.key=value ...]``."""

import sys

from recap_ds.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
