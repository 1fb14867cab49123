"""A leg of a run that changes its ranks: load where another world stopped, train on, save.

python -m tests.checkpoint.elastic_worker FOLDER FIRST_STEP LAST_STEP DS_NAME ACCUMULATION, on any number of ranks
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.base import base_folder
from recap_ds.checkpoint.resume import load_checkpoint
from recap_ds.distributed.runtime import Runtime
from recap_ds.recipe import load_config
from tests.checkpoint.checkpoint_worker import raw_and_average, save
from tests.checkpoint.tiny_run import TinyRun, start, train
from tests.distributed.harness import worker_main

KINDS = ("full", "lora")
# Shifting all keys changes no attention: the true gradient is zero, and Adam makes full steps of what rounding leaves.
WITHOUT_GRADIENT = ("k_proj.bias", "pool.key.bias")


def legs(runtime: Runtime, folder: str, first: str, last: str, ds_name: str, accumulation: str) -> dict:
    steps = range(int(first), int(last))
    return {kind: leg(runtime, Path(folder) / kind, steps, ds_name, int(accumulation)) for kind in KINDS}


def leg(runtime: Runtime, folder: Path, steps: range, ds_name: str, accumulation: int) -> dict:
    """Losses, and how far the whole tensors are from those of the run that never changed. Collective."""
    config = load_config(folder / "config.yaml")
    run = start(config, runtime, ds_name, base_folder(folder), accumulation=accumulation)
    path = folder / layout.CHECKPOINTS_NAME / layout.step_name(steps.start)
    state, _ = load_checkpoint(path, runtime=runtime, engine=run.engine, shadows=run.shadows)
    assert state["step"] == steps.start
    losses = train(run, steps, runtime)
    save(run, folder, steps.stop, runtime, keep_last=99)
    return {"losses": losses, "distance": distance(run, folder)}


def distance(run: TinyRun, folder: Path) -> float:
    """The largest |difference| / |value| over whole tensors, in 2-norms. Collective: every rank must call."""
    end, found = load_file(folder / "end.safetensors"), raw_and_average(run)
    assert found.keys() == end.keys()
    return max(
        float((found[name] - end[name]).norm() / (end[name].norm() + torch.finfo().tiny))
        for name in end
        if not name.endswith(WITHOUT_GRADIENT)
    )


if __name__ == "__main__":
    worker_main(legs)
