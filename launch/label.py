"""Label: ``deepspeed launch/label.py --checkpoint EXPORT_OR_RUN --shards FOLDER --tag TAG [section.key=value ...]``."""

import sys

from recap_ds.cli.label import main

# The guard matters: data workers import this file again.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
