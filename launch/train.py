"""Train: ``deepspeed launch/train.py --deepspeed ds_configs/zero3.json [--config RECIPE] [section.key=value ...]``.

Any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* will do; with none it is one process.
"""

import sys
from pathlib import Path

from recap_ds.cli.train import main
from recap_ds.errors import leave

# The guard matters: data workers import this file again.
if __name__ == "__main__":
    leave(main(sys.argv[1:], quickstart=Path(__file__).parent / "recipes" / "quickstart.yaml"))
