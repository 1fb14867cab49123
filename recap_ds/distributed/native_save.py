"""DeepSpeed's own checkpoint, written so that a disk that fails on one rank fails on all.

DeepSpeed waits at barriers between its writes, and a rank that raises in one leaves the others there. So nothing raises
before the last barrier: what went wrong is kept, for the caller to agree on.
"""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from recap_ds.files.records import sync_file

NATIVE_TAG = "zero"
LATEST_NAME = "latest"  # DeepSpeed's tools read the tag there
RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


class NativeSave(CheckpointEngine):
    """Stands in for DeepSpeed's own writer during one save, and remembers what this rank wrote or failed to."""

    def __init__(self, writer: CheckpointEngine) -> None:
        super().__init__()
        self._writer = writer
        self._paths: list[Path] = []
        self._error: OSError | None = None

    def paths(self) -> list[Path]:
        """The files that this rank wrote, flushed to the disk; OSError where one could not be."""
        if self._error is not None:
            raise self._error
        for path in self._paths:
            sync_file(path)
        return self._paths

    def attempt(self, path: Path, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._error = self._error or error
        except RuntimeError as error:  # torch's zip writer does not say what the disk said
            reason = f"torch could not write it ({str(error).splitlines()[0]})"
            self._error = self._error or OSError(errno.EIO, reason, str(path))

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self._error is None:
            self._paths.append(Path(path))
            self.attempt(Path(path), lambda: self._writer.save(state_dict, path))

    def add(self, path: Path, write: Callable[[], Any]) -> None:
        """A file that is no tensors'."""
        if self._error is None:
            self._paths.append(path)
            self.attempt(path, write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(Path(path), lambda: self._writer.makedirs(path, exist_ok=exist_ok))

    def create(self, info: CheckpointCommitInfo) -> None:
        self._writer.create(info)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return self._writer.commit(info)

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("this writer lives only during a save")


def save_native(engine: DeepSpeedEngine, folder: Path) -> NativeSave:
    """Write into ``folder``, for DeepSpeed's ``zero_to_fp32.py``; whether it worked, the result's ``paths`` says.

    Collective: every rank must call.
    """
    writer = engine.checkpoint_engine
    save = NativeSave(writer)
    engine.checkpoint_engine, engine._copy_recovery_script = save, lambda _: None
    try:
        # It would write ``latest`` and copy its scripts between two barriers.
        engine.save_checkpoint(str(folder), tag=NATIVE_TAG, client_state={}, save_latest=False)
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script  # the class has it
    if engine.global_rank == 0:
        save.add(folder / LATEST_NAME, lambda: (folder / LATEST_NAME).write_text(NATIVE_TAG))
        sources = Path(deepspeed.__file__).parent / "utils"
        for name in RECOVERY_SCRIPTS:
            save.add(folder / name, lambda name=name: shutil.copy(sources / name, folder / name))
    return save
