"""Evaluate: ``deepspeed launch/evaluate.py --checkpoint EXPORT_OR_RUN --shards FOLDER [section.key=value ...]``."""

import sys

from recap_ds.cli.evaluate import main
from recap_ds.errors import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
