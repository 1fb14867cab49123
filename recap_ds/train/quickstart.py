"""The embedded quickstart's data: a little shard set of the built-in task, made on first use."""

import time
from pathlib import Path

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.distributed.runtime import RankInfo
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.errors import UsageError

WAIT_SECONDS = 120.0


def ensure_quickstart_shards(config: PiStarRECAPConfig, info: RankInfo) -> None:
    """Make the shards where there are none; other ranks wait for the manifest, which is written last."""
    if config.data.shards is None:
        raise UsageError("data.shards: the quickstart needs a folder to make its shards in")
    folder = Path(config.data.shards)
    manifest = folder / MANIFEST_NAME
    if info.is_main and not manifest.is_file():
        print(f"making the quickstart's shards in {folder}", flush=True)
        write_reach_shards(folder, chunk_size=config.chunk_size)
    deadline = time.monotonic() + WAIT_SECONDS
    while not manifest.is_file():
        if time.monotonic() > deadline:
            raise UsageError(f"data.shards: {folder} was not made within {WAIT_SECONDS:.0f} s; see rank 0's output")
        time.sleep(0.2)
