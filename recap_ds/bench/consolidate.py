"""``recap-ds bench consolidate``: our export beside DeepSpeed's zero_to_fp32, on the same state; are they equal?"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recap_ds.bench.made_state import BYTES_PER_PARAMETER, MadeState, make_state
from recap_ds.bench.measured import Measured, measure
from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.distributed.native import zero_to_fp32
from recap_ds.errors import UsageError
from recap_ds.files.tensor_reader import TensorFileReader
from recap_ds.files.tensors import TensorSource
from recap_ds.models.export_format import VLM_NAME, ExportRecord, head_file
from recap_ds.models.vlm_weights import model_name, weight_files

MIB = 2**20
ALLOWANCE_MIB = 400.0  # that our peak may be above the largest file written
SMALL_PARAMETERS = 10**6


def bench_consolidate(num_parameters: int, max_shard_bytes: int, folder: Path | None = None) -> dict[str, Any]:
    """Figures as JSON. ``folder`` (the system's for temporary files): where the states are written for a while."""
    root = Path(folder or tempfile.gettempdir())
    if not root.is_dir():
        raise UsageError(f"--folder {root}: there is no such folder; make it, or name another")
    needed, free = num_parameters * BYTES_PER_PARAMETER, shutil.disk_usage(root).free
    if needed > free:
        raise UsageError(
            f"--folder {root}: {free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB are needed; name another, "
            "or fewer --parameters"
        )
    with tempfile.TemporaryDirectory(prefix="recap_ds_bench_", dir=root) as temporary:
        place = Path(temporary)
        small = make_state(place / "small", SMALL_PARAMETERS)
        large = make_state(place / "large", num_parameters)
        return _compare(place, small, large, max_shard_bytes)


def _compare(place: Path, small: MadeState, large: MadeState, max_shard_bytes: int) -> dict[str, Any]:
    def measured(function: Callable[..., Any], out: str, source: str, **options: Any) -> Measured:
        options |= {"max_shard_bytes": max_shard_bytes}
        first = {"checkpoint": str(small._asdict()[source]), "out": str(place / f"{out}_small"), **options}
        second = {"checkpoint": str(large._asdict()[source]), "out": str(place / out), **options}
        return measure(function, first, second)

    ours = measured(consolidate, "ours", "run", weights="raw")
    native = measured(consolidate, "from_native", "native")
    theirs = measured(zero_to_fp32, "theirs", "native")
    shards = [path.stat().st_size / MIB for path in (place / "ours").rglob("*.safetensors")]
    bound = max(shards) + ALLOWANCE_MIB
    return {
        "bench": "consolidate",
        "parameters": large.num_parameters,
        "num_files": len(shards),
        "largest_file_mib": round(max(shards), 1),
        "peak_bound_mib": round(bound, 1),
        "within_bound": ours.peak_mib <= bound,
        "ours": _figures(ours),
        "ours_from_deepspeed_folder": _figures(native),
        "zero_to_fp32": _figures(theirs),
        "peak_ratio": round(ours.peak_mib / theirs.peak_mib, 3),
        "seconds_ratio": round(ours.seconds / theirs.seconds, 3),
        "equal": all(same_tensors(place / mine, place / "theirs") for mine in ("ours", "from_native")),
    }


def _figures(measured: Measured) -> dict[str, float]:
    return {name: round(value, 2) for name, value in measured._asdict().items()}


def same_tensors(export: Path, other: Path) -> bool:
    """True = the same names, shapes and values, bit for bit; ``other`` is what zero_to_fp32 wrote."""
    mine = {f"vlm.paligemma.{model_name(name)}": source for name, source in _sources(export / VLM_NAME).items()}
    for head in ExportRecord.load(export).heads:
        tensors = TensorFileReader(export / head_file(head))
        mine |= {f"{head}.{name}": tensors.source(name) for name in tensors.tensors}
    theirs = _sources(other)
    return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def _sources(folder: Path) -> dict[str, TensorSource]:
    readers = [TensorFileReader(path) for path in weight_files(folder)]
    return {name: reader.source(name) for reader in readers for name in reader.tensors}


def _equal(first: TensorSource, second: TensorSource) -> bool:
    pairs = zip(first.pieces(), second.pieces(), strict=True)
    return first.shape == second.shape and all(torch.equal(one, other) for one, other in pairs)
