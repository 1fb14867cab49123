"""An export of whatever a user calls a checkpoint: the export itself, or one made next to the run and kept.

There is no process group yet: rank 0 makes it, the others wait for the folder, which appears complete.
"""

from pathlib import Path

from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.checkpoint.layout import resolve_checkpoint, run_of
from recap_ds.distributed.runtime import RankInfo, wait_for_file
from recap_ds.models.export_format import EXPORT_NAME

WAIT_SECONDS = 1800.0


def export_of(checkpoint: str | Path, info: RankInfo) -> Path:
    """``checkpoint``: an export, a run, a step folder, latest or best. UsageError where it is none of them."""
    path = Path(checkpoint)
    if (path / EXPORT_NAME).is_file():
        return path
    step_folder = resolve_checkpoint(path)
    out = run_of(step_folder) / "exports" / step_folder.name
    if info.is_main and not (out / EXPORT_NAME).is_file():
        consolidate(step_folder, out)
    wait_for_file(out / EXPORT_NAME, WAIT_SECONDS, f"--checkpoint {checkpoint}: rank 0 made no export of it")
    return out
