"""Label: ``deepspeed launch/label.py --checkpoint EXPORT_OR_RUN --shards FOLDER --tag TAG [section.key=value ...]``."""

import sys

from recap_ds.cli.label import main
from recap_ds.errors import leave

# The guard matters: data workers import this file again.
if __name__ == "__main__":
    leave(main(sys.argv[1:]))
