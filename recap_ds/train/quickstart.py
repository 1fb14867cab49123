"""The embedded quickstart's data: a little shard set of the built-in task, made on first use."""

from pathlib import Path

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.distributed.runtime import RankInfo, wait_for_file
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
    wait_for_file(manifest, WAIT_SECONDS, f"data.shards: {folder} was not made")
