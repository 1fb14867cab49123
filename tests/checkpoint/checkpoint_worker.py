"""Two ranks train, save and resume tiny runs; what a single process can check later is left in the folder.

<folder>/<kind>/                    a run with checkpoints of steps 2 and 4
<folder>/<kind>/truth.safetensors   whole tensors at step 4 (raw/ and ema/ + name) and the engine's actions
<folder>/<kind>/truth.json          losses of steps 4 and 5
<folder>/<ds config>/               a run in bf16 under another shipped DeepSpeed config
<folder>/failure/                   a run on which one rank's disk was full
<folder>/background/                a run saved by threads, one of them slow and one of them on a full disk
"""

import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from recap_ds.checkpoint import save as save_module
from recap_ds.checkpoint import saver as saver_module
from recap_ds.checkpoint.base import base_folder, ensure_base
from recap_ds.checkpoint.resume import find_checkpoint, load_checkpoint
from recap_ds.checkpoint.save import save_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.config import CheckpointConfig, PiStarRECAPConfig
from recap_ds.distributed.build import gather
from recap_ds.distributed.flags import FlagExchange, StepFlags
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.tiles import KEYS, local_shard, local_tiles, read_adam_step, read_tile
from recap_ds.errors import RunFailed
from recap_ds.recipe import load_config
from tests.checkpoint.hand_made import KINDS
from tests.checkpoint.tiny_run import TinyRun, evaluate_actions, start, start_folder, train
from tests.distributed.harness import worker_main

RING = {"values": torch.arange(6, dtype=torch.float64).view(2, 3), "counts": torch.tensor([3, 1])}


# Other shipped DeepSpeed configs, all in bf16; hpZ last, as its groups are a global of DeepSpeed.
LAYOUTS = ("zero3_offload", "zero2", "zero3_hpz")


def scenarios(runtime: Runtime, folder: str) -> dict:
    results = {kind: one_run(runtime, Path(folder) / kind, kind) for kind in KINDS}
    results |= {ds_name: other_layout(runtime, Path(folder) / ds_name, ds_name) for ds_name in LAYOUTS}
    results["failure"] = failing_rank(runtime, Path(folder) / "failure")
    results["background"] = background(runtime, Path(folder) / "background")
    return results


def save(run: TinyRun, folder: Path, step: int, runtime: Runtime, **keep) -> Path:
    return save_checkpoint(
        folder / "checkpoints",
        step,
        runtime=runtime,
        engine=run.engine,
        shadows=run.shadows,
        state={"step": step, "next_slot": 4 * step},
        tensors=RING,
        keep=CheckpointConfig(**keep),
        best=step == 2,
    )


def new_folder(folder: Path, kind: str, runtime: Runtime) -> PiStarRECAPConfig:
    if runtime.info.is_main:
        start_folder(folder, kind)
    runtime.barrier()
    return load_config(folder / "config.yaml")


def one_run(runtime: Runtime, folder: Path, kind: str) -> dict:
    config = new_folder(folder, kind, runtime)
    run = start(config, runtime)
    ensure_base(folder, run.engine.module, config, runtime)
    train(run, range(2), runtime)
    save(run, folder, 2, runtime)
    losses = train(run, range(2, 4), runtime)
    save(run, folder, 4, runtime, also_deepspeed=True)
    straight = snapshot(run)

    resumed = start(config, runtime, vlm_folder=base_folder(folder))
    ensure_base(folder, resumed.engine.module, config, runtime)
    state, ring = load_checkpoint(
        folder / "checkpoints" / "step_00000002", runtime=runtime, engine=resumed.engine, shadows=resumed.shadows
    )
    resumed_losses = train(resumed, range(2, 4), runtime)
    differing = [key for key, value in snapshot(resumed).items() if not torch.equal(value, straight[key])]
    leave_truth(run, folder, runtime)
    return {
        "losses": losses,
        "resumed_losses": resumed_losses,
        "differing": differing,
        "num_compared": len(straight),
        "adam_steps": [read_adam_step(run.engine), read_adam_step(resumed.engine)],
        "state": state,
        "ring_is_equal": ring.keys() == RING.keys() and all(torch.equal(ring[name], RING[name]) for name in RING),
        "found": find_checkpoint(folder / "checkpoints", runtime).name,
    }


def other_layout(runtime: Runtime, folder: Path, ds_name: str) -> dict:
    """Resume at the layout that wrote, in bf16: masters come back, not the rounded weights of the forward."""
    config = new_folder(folder, "lora", runtime)
    run = start(config, runtime, ds_name, bf16=True)
    ensure_base(folder, run.engine.module, config, runtime)
    train(run, range(2), runtime)
    path = save(run, folder, 2, runtime, also_deepspeed=True)
    losses = train(run, range(2, 4), runtime)
    resumed = start(config, runtime, ds_name, base_folder(folder), bf16=True)
    load_checkpoint(path, runtime=runtime, engine=resumed.engine, shadows=resumed.shadows)
    resumed_losses = train(resumed, range(2, 4), runtime)
    straight = snapshot(run)
    differing = [key for key, value in snapshot(resumed).items() if not torch.equal(value, straight[key])]
    return {"losses": losses, "resumed_losses": resumed_losses, "differing": differing}


def snapshot(run: TinyRun) -> dict[str, Tensor]:
    """Copies of all that this rank owns, and of what its forward reads."""
    params = dict(run.engine.module.named_parameters())
    tiles = {
        f"{key}/{tile.name}": read_tile(params[tile.name], key).clone()
        for tile in local_tiles(run.engine)
        for key in KEYS
    }
    for kind, shadow in run.shadows.items():
        tiles |= {f"{kind}/{tile.name}": values.clone() for tile, values in shadow.tiles()}
    return tiles | {f"forward/{name}": local_shard(param).clone() for name, param in params.items()}


def whole_tensors(run: TinyRun) -> Iterator[tuple[str, Tensor]]:
    """Collective: every rank must call."""
    for name, param in run.engine.module.named_parameters():
        with gather([param]):
            yield name, param.detach().clone()


def leave_truth(run: TinyRun, folder: Path, runtime: Runtime) -> None:
    """By DeepSpeed's own gathers, independent of tiles and files. Collective: every rank must call."""
    truth = {}
    for name, value in whole_tensors(run):
        truth[f"raw/{name}"] = value
    truth["actions/raw"] = evaluate_actions(run, seed=9)
    with run.shadows["ema"].swapped_into_online():
        truth |= {f"ema/{name}": value for name, value in whole_tensors(run)}
        truth["actions/ema"] = evaluate_actions(run, seed=9)
    losses = train(run, range(4, 6), runtime)
    if runtime.info.is_main:
        save_file(truth, folder / "truth.safetensors")
        (folder / "truth.json").write_text(json.dumps(losses))


def full_on_rank_1(runtime: Runtime):
    """A stand-in for a function that writes to one of its arguments: rank 1's disk is full."""

    def full_disk(*arguments):
        if runtime.info.rank == 1:
            path = next(argument for argument in arguments if isinstance(argument, str | Path))
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return full_disk.whole(*arguments)

    return full_disk


def failing_rank(runtime: Runtime, folder: Path) -> dict:
    """Rank 1's disk is full: nobody has a checkpoint, everybody has the same reason; later it works again."""
    run = start(new_folder(folder, "frozen", runtime), runtime)
    save(run, folder, 2, runtime)
    save(run, folder, 4, runtime)
    places = {"ours": (save_module, "write_tile_file", {}), "deepspeed": (run.engine.checkpoint_engine, "save", {})}
    places["deepspeed"][2]["also_deepspeed"] = True
    messages = {}
    for name, (owner, function, keep) in places.items():
        full_disk = full_on_rank_1(runtime)
        full_disk.whole = getattr(owner, function)
        setattr(owner, function, full_disk)
        try:
            save(run, folder, 6, runtime, **keep)
        except RunFailed as error:
            messages[name] = str(error)
        setattr(owner, function, full_disk.whole)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir()) if runtime.info.is_main else None
    latest = (folder / "checkpoints" / "latest").readlink().name
    runtime.barrier()  # nobody saves again before both have looked
    save(run, folder, 8, runtime, keep_last=1)
    after = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"messages": messages, "before": before, "latest": latest, "after": after}


def background(runtime: Runtime, folder: Path) -> dict:
    """Rank 1 writes slowly, and training goes on; then its disk is full; then all is well."""
    run = start(new_folder(folder, "frozen", runtime), runtime)
    train(run, range(2), runtime)
    save(run, folder, 2, runtime)  # in the foreground: what the thread's must equal
    said, seen = [], []
    saver = CheckpointSaver(
        folder / "checkpoints",
        runtime=runtime,
        engine=run.engine,
        shadows=run.shadows,
        keep=CheckpointConfig(background=True, keep_last=9),
        newest_step=2,
        say=said.append,
    )
    flags, may_write, whole = FlagExchange(), threading.Event(), saver_module.write_files

    def boundary() -> None:
        saver.advance(bool(flags.exchange(StepFlags(writing=saver.writing)).writing))
        seen.append((folder / "checkpoints" / "latest").readlink().name)
        runtime.barrier()  # both have looked

    def slow(pending, rank):
        assert rank == 0 or may_write.wait(60)
        return whole(pending, rank)

    saver_module.write_files = slow
    begun = saver.save(3, {"step": 3}, RING)
    losses = train(run, range(2, 5), runtime)
    for _ in range(3):
        boundary()
    may_write.set()
    while saver._background is not None:
        boundary()
    until_committed = seen.index("step_00000003")
    full_disk = full_on_rank_1(runtime)
    full_disk.whole = save_module.write_tile_file
    saver_module.write_files, save_module.write_tile_file = whole, full_disk
    saver.save(5, {"step": 5}, RING)
    saver.finish()
    save_module.write_tile_file = full_disk.whole
    failed = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    runtime.barrier()
    saver.save(6, {"step": 6}, RING)
    saver.finish()
    saver.save(7, {"step": 7}, RING, last=True)
    flags.close()
    return {
        "begun": begun,
        "losses": losses,
        "until_committed": until_committed,
        "said": said,
        "failed": failed,
        "after": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


if __name__ == "__main__":
    worker_main(scenarios)
