"""Tables beside the shards: one parquet file per shard, its rows the shard's samples in tar order.

What is not known is null. Rows carry key, episode and frame, and are taken for a sample's only where these agree.
``values.py`` and ``labels.py`` say what else is in them.

    n samples of a shard   N samples of the set
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recap_ds.data.index import ShardIndex
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

AGAIN = "run launch/label.py again with this tag: it makes again what is missing or damaged"


def sidecar_path(folder: Path, shard: str) -> Path:
    return folder / Path(shard).with_suffix(".parquet").name


def identity_columns(shard_set: ShardSet, shard: int) -> dict[str, pa.Array]:
    index = ShardIndex.load(ShardIndex.path_of(shard_set.folder / shard_set.manifest.shards[shard].name))
    return {
        "key": pa.array(index.keys),
        "episode": pa.array(index.episodes[index.episode]),
        "frame": pa.array(index.frame),
    }


def nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float32), from_pandas=True)  # NaN -> null


def floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, np.float32("nan")).to_numpy().astype(np.float32)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None


def write_table(path: Path, columns: dict[str, pa.Array]) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    try:
        write_file(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def read_table(shard_set: ShardSet, folder: Path, shard: int, columns: Iterable[str]) -> pa.Table:
    """Key, episode, frame and ``columns`` of one shard. The caller has seen that the file is whole."""
    path = sidecar_path(folder, shard_set.manifest.shards[shard].name)
    try:
        table = pq.read_table(path, columns=["key", "episode", "frame", *columns])
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: damaged ({str(error).splitlines()[0]}); remove it and {AGAIN}") from None
    rows = slice(shard_set.shard_starts[shard], shard_set.shard_starts[shard + 1])
    wanted = [shard_set.episodes[number] for number in shard_set.table.episode[rows]]
    if (
        not np.array_equal(table["frame"].to_numpy(), shard_set.table.frame[rows])
        or table["episode"].to_pylist() != wanted
        or table["key"].null_count
    ):
        raise UsageError(f"{path}: its rows are not the shard's samples; remove it and {AGAIN}")
    return table


def read_all(shard_set: ShardSet, folder: Path, columns: Iterable[str]) -> pa.Table:
    """[N] all shards' rows in the order of sample ids."""
    shards = range(len(shard_set.manifest.shards))
    return pa.concat_tables([read_table(shard_set, folder, shard, columns) for shard in shards])


def check_manifest(shard_set: ShardSet, folder: Path, manifest_hash: str) -> None:
    now = shard_set.manifest.content_hash()
    if manifest_hash != now:
        raise UsageError(
            f"{folder}: made for other shards (manifest {manifest_hash[:12]}, {shard_set.folder} is now {now[:12]}); "
            "run launch/label.py with a new tag"
        )


def unknown_tag(shards: Path, kind: str, name: str, tag: str) -> UsageError:
    there = sorted(path.parent.name for path in (shards / kind).glob(f"*/{name}"))
    listed = f"there are {', '.join(there)}" if there else "there are none; make some with launch/label.py"
    return UsageError(f"{shards}: no {kind} with the tag '{tag}'; {listed}")
