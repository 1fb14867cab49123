"""Every file and folder name of a run, and how a CHECKPOINT argument becomes a step folder.

    runs/NAME/config.yaml contract.json       what was run, and for which robot
    runs/NAME/summary.json                    what a finished run came to
    runs/NAME/base.json base/                 the frozen VLM: where it is, or the thing itself (see base.py)
    runs/NAME/checkpoints/step_00000500/      one checkpoint
    runs/NAME/checkpoints/latest, best        relative links to one
    .../step_00000500/state.json              everything but tensors; written last
    .../step_00000500/rank_00000.safetensors  a rank's tiles
    .../step_00000500/shared.safetensors      small tensors that are equal on every rank
    .../step_00000500/deepspeed/              optional: DeepSpeed's own format

A name that begins with a dot is unfinished or on its way out; readers never look at it.
"""

import os
import re
import shutil
from pathlib import Path

from recap_ds.errors import UsageError

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
SUMMARY_NAME = "summary.json"
BASE_NAME = "base"
BASE_RECORD_NAME = "base.json"
STATE_NAME = "state.json"
SHARED_NAME = "shared.safetensors"
NATIVE_NAME = "deepspeed"
LATEST = "latest"
BEST = "best"
_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def unfinished_name(step: int) -> str:
    return f".{step_name(step)}.unfinished"


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Finished checkpoints by step, ascending; whether they are whole is for ``verify_checkpoint`` to say."""
    if not checkpoints.is_dir():
        return {}
    found = {parse_step(path.name): path for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def run_of(step_folder: Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    return step_folder.parent.parent


def set_link(checkpoints: Path, link: str, step: int) -> None:
    """Point ``latest`` or ``best`` at a checkpoint, in one rename: there is never a moment without it."""
    temporary = checkpoints / f".{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(step_name(step))
    os.replace(temporary, checkpoints / link)


def linked_step(checkpoints: Path, link: str) -> int | None:
    """The step that ``latest`` or ``best`` points at; None where it is absent or points at nothing."""
    path = checkpoints / link
    return parse_step(os.readlink(path)) if path.is_symlink() and path.exists() else None


def best_or_latest(run: Path) -> Path:
    """The run's checkpoint that is best by its gate, or the last one where nothing was held out to choose by."""
    checkpoints = run / CHECKPOINTS_NAME
    return checkpoints / (BEST if linked_step(checkpoints, BEST) is not None else LATEST)


def hide_folder(folder: Path) -> Path:
    """Rename out of sight, to be deleted later: a deletion cut short must not leave half a checkpoint behind."""
    hidden = folder.with_name(f".{folder.name}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.replace(folder, hidden)
    return hidden


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder meant by a run, a step folder, latest or best (``runs/x/latest`` is understood too)."""
    path = Path(path)
    if path.name in (LATEST, BEST) or parse_step(path.name) is not None:
        for candidate in (path, path.parent / CHECKPOINTS_NAME / path.name):
            if (candidate / STATE_NAME).is_file():
                return candidate.resolve()
    checkpoints = next((folder for folder in (path / CHECKPOINTS_NAME, path) if step_folders(folder)), None)
    if checkpoints is None:
        raise UsageError(f"CHECKPOINT {path}: {_what_is_there(path)}")
    # A link that points nowhere is passed over: the folders themselves say what there is.
    step = linked_step(checkpoints, LATEST) or max(step_folders(checkpoints))
    return step_folders(checkpoints)[step].resolve()


def _what_is_there(path: Path) -> str:
    for folder in (path, path / CHECKPOINTS_NAME, path.parent, path.parent / CHECKPOINTS_NAME):
        if steps := step_folders(folder):
            links = [name for name in (LATEST, BEST) if linked_step(folder, name) is not None]
            return f"no such checkpoint; {folder} has {', '.join([*links, *(p.name for p in steps.values())])}"
    if not path.exists():
        return "there is no such folder"
    return "holds no checkpoint; give a run folder, or one of its checkpoints/step_... folders"
