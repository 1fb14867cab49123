"""``recap-ds bench resume``: how long a save stops training, in the foreground and in the background, and a load.

One rank with a ZeRO-3 engine over a stack of linear layers: a save moves the same 16 bytes per parameter (master, two
moments, average) whatever the model. While the thread writes, nothing else runs, so its time is the disk's own.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from recap_ds.checkpoint.layout import CHECKPOINTS_NAME
from recap_ds.checkpoint.record import CheckpointRecord, verify_checkpoint
from recap_ds.checkpoint.resume import load_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.checkpoint.tile_file import EMA
from recap_ds.config import CheckpointConfig
from recap_ds.distributed.build import sharded_build, whole_numel
from recap_ds.distributed.engine import DeepSpeedEngine, build_engine, destroy_engine
from recap_ds.distributed.runtime import RankInfo, Runtime, start_runtime, stop_runtime
from recap_ds.distributed.shadows import Shadow
from recap_ds.errors import UsageError

WIDTH = 1024
BYTES_PER_PARAMETER = 16
# Two checkpoints at a time while one replaces the other, of each kind of save.
CHECKPOINTS_AT_ONCE = 4
DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 1,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": False},
}


class State(NamedTuple):
    engine: DeepSpeedEngine
    shadows: dict[str, Shadow]
    runtime: Runtime


class Stalls(NamedTuple):
    """Seconds, each the median over the repeats."""

    stall: float  # in which training stood still
    written: float  # from the save's begin until the checkpoint was there
    folder: Path  # the last one


def bench_resume(num_parameters: int, num_repeats: int, folder: Path | None = None) -> dict[str, Any]:
    """Figures as JSON. ``folder`` (the system's for temporary files) is on the disk that is measured."""
    root = Path(folder or tempfile.gettempdir())
    if not root.is_dir():
        raise UsageError(f"--folder {root}: there is no such folder")
    needed, free = num_parameters * BYTES_PER_PARAMETER * CHECKPOINTS_AT_ONCE, shutil.disk_usage(root).free
    if needed > free:
        raise UsageError(
            f"--folder {root}: {free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB are needed; name another, "
            "or fewer --parameters"
        )
    runtime = start_runtime(RankInfo())
    try:
        with tempfile.TemporaryDirectory(prefix="recap_ds_bench_", dir=root) as temporary:
            state = build_state(num_parameters, runtime)
            figures = _measure(state, Path(temporary), num_repeats)
            destroy_engine(state.engine)
    finally:
        stop_runtime()
    return figures


def build_state(num_parameters: int, runtime: Runtime) -> State:
    """About ``num_parameters`` trainable ones, in layers of a million."""
    num_layers = max(1, round(num_parameters / (WIDTH * WIDTH)))
    with sharded_build(DS_CONFIG):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    group = {"name": "all", "params": list(model.parameters()), "lr": 1e-4, "weight_decay": 0.0}
    engine = build_engine(model, [group], DS_CONFIG)
    return State(engine, {EMA: Shadow(dict(engine.module.named_parameters()))}, runtime)


def _measure(state: State, place: Path, num_repeats: int) -> dict[str, Any]:
    foreground = _save(state, place / "foreground", num_repeats, background=False)
    background = _save(state, place / "background", num_repeats, background=True)
    verify_seconds = _seconds(lambda: verify_checkpoint(background.folder))
    engine, shadows, runtime = state
    load_seconds = _seconds(lambda: load_checkpoint(background.folder, runtime=runtime, engine=engine, shadows=shadows))
    records = [CheckpointRecord.load(saves.folder).files for saves in (foreground, background)]
    num_parameters = sum(whole_numel(parameter) for parameter in engine.module.parameters())
    num_bytes = sum(record.bytes for record in records[0].values())
    return {
        "bench": "resume",
        "parameters": num_parameters,
        "bytes": num_bytes,
        "repeats": num_repeats,
        "device": str(runtime.device),
        "foreground_stall_seconds": round(foreground.stall, 3),
        "background_stall_seconds": round(background.stall, 3),
        "stall_ratio": round(background.stall / foreground.stall, 4),
        "background_written_seconds": round(background.written, 3),
        "verify_seconds": round(verify_seconds, 3),
        "load_seconds": round(load_seconds, 3),
        "load_gb_per_second": round(num_bytes / load_seconds / 1e9, 2),
        "equal": records[0] == records[1],
    }


def _save(state: State, run: Path, num_repeats: int, background: bool) -> Stalls:
    engine, shadows, runtime = state
    run.mkdir()
    saver = CheckpointSaver(
        run / CHECKPOINTS_NAME,
        runtime=runtime,
        engine=engine,
        shadows=shadows,
        keep=CheckpointConfig(keep_last=1, background=background),
        newest_step=None,
        say=lambda line: None,
    )
    stalls, written = [], []
    for step in range(1, num_repeats + 1):
        began = time.perf_counter()
        saver.save(step, {}, {})
        stall = time.perf_counter() - began
        while saver.writing:
            time.sleep(0.001)
        # The second half of the stall: rename, link, and the older one removed.
        stalls.append(stall + _seconds(saver.finish))
        written.append(time.perf_counter() - began)
    (folder,) = (run / CHECKPOINTS_NAME).glob("step_*")
    return Stalls(statistics.median(stalls), statistics.median(written), folder)


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
