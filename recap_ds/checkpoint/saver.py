"""A run's checkpoints as they are made: in the foreground or by a thread, and again after a save that failed.

In the background a save copies what it needs to the host and returns; a thread writes, flushes and checksums, and
nothing else: it takes part in no collective. Whether any rank still writes rides on the flags that all ranks exchange
every step. At the boundary where none does, all ranks commit together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.save import Files, SaveFailed, UnfinishedSave, begin_save, commit_save, write_files
from recap_ds.checkpoint.snapshot import live_tiles, take_snapshot
from recap_ds.config import CheckpointConfig
from recap_ds.distributed.engine import DeepSpeedEngine
from recap_ds.distributed.host_copy import HostCopy
from recap_ds.distributed.runtime import Runtime
from recap_ds.distributed.shadows import Shadow

# What is agreed at a boundary was posted at the one before: only the second after a save's begin speaks of that save.
FLAG_DELAY_STEPS = 2


class BackgroundWrite:
    """``write_files`` in a thread of its own."""

    def __init__(self, save: UnfinishedSave, rank: int) -> None:
        self.save = save
        self.boundaries = 0  # step boundaries since it began
        self._files: Files | None = None
        self._error: Exception | None = None
        # A daemon: a run that fails does not wait for a checkpoint that nobody will commit.
        self._thread = Thread(target=self._run, args=(rank,), name=f"checkpoint {save.step}", daemon=True)
        self._thread.start()

    def _run(self, rank: int) -> None:
        try:
            self._files = write_files(self.save, rank)
        except Exception as error:  # raised by ``result``, where the ranks agree on it
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Files:
        """Waits for the thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._files is not None
        return self._files


class CheckpointSaver:
    """All of it is collective but ``writing``: every rank must build it and make the same calls."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        runtime: Runtime,
        engine: DeepSpeedEngine,
        shadows: Mapping[str, Shadow],
        keep: CheckpointConfig,
        newest_step: int | None,
        say: Callable[[str], None],
    ) -> None:
        """``newest_step`` is of the checkpoint that the run went on from; ``say`` gives rank 0's lines to people."""
        self._checkpoints, self._runtime, self._engine, self._shadows = checkpoints, runtime, engine, shadows
        self._keep, self._newest_step, self._say = keep, newest_step, say
        self._failed_in_a_row = 0
        self._background: BackgroundWrite | None = None
        # Now and not at the first save: memory that is not there is better missed in the first minute.
        self._room = HostCopy([tile.values for tile in live_tiles(engine, shadows)]) if keep.background else None

    @property
    def newest_step(self) -> int | None:
        """Of the newest checkpoint that is whole; one that is still being written is not."""
        return self._newest_step

    def rewind(self, step: int) -> None:
        """The run went back to the checkpoint of ``step``: what is newer is not its own any more."""
        assert self._background is None, "finish first"
        self._newest_step = step

    @property
    def writing(self) -> bool:
        """This rank's part of what every rank posts at a step boundary."""
        return self._background is not None and self._background.running

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        best: bool = False,
        last: bool = False,
    ) -> bool:
        """Save between two optimizer steps; False where it failed and the run can go on, which is said.

        ``best`` and ``last`` ones are complete on return, and a ``last`` one that fails raises. In the background, True
        means that writing has begun. Collective: every rank must call.
        """
        if self.writing:
            self._say(
                f"warning: step {self._background.save.step} is still being written and step {step} is due: training "
                "waits; raise checkpoint.save_every_steps"
            )
        self.finish()
        snapshot = take_snapshot(self._engine, self._shadows, self._runtime.info, step, state, tensors)
        in_thread = self._room is not None and not best and not last
        try:
            if in_thread:
                snapshot = snapshot.on_host(self._room)
            save = begin_save(self._checkpoints, snapshot, self._runtime, self._engine, self._keep, best)
            if not in_thread:
                self._commit(save, lambda: write_files(save, self._runtime.info.rank))
        except SaveFailed as error:
            return self._go_on(step, error, last)
        if in_thread:
            self._background = BackgroundWrite(save, self._runtime.info.rank)
        return True

    def advance(self, writing_anywhere: bool) -> None:
        """At every step boundary, with what the ranks agreed on there: commit when none of them writes any more.

        Collective: every rank must call.
        """
        if self._background is None:
            return
        self._background.boundaries += 1
        if self._background.boundaries >= FLAG_DELAY_STEPS and not writing_anywhere:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written and commit it. Collective: every rank must call."""
        if self._background is None:
            return
        background, self._background = self._background, None
        try:
            self._commit(background.save, background.result)
        except SaveFailed as error:
            self._go_on(background.save.step, error, last=False)

    def _commit(self, save: UnfinishedSave, written: Callable[[], Files]) -> None:
        commit_save(save, written, self._runtime, self._keep)
        self._newest_step, self._failed_in_a_row = save.step, 0

    def _go_on(self, step: int, error: SaveFailed, last: bool) -> bool:
        """False; raises where it was the last, where it failed too often, or where there is nothing to fall back on."""
        self._failed_in_a_row += 1
        limit = self._keep.max_failed_saves
        if last or self._newest_step is None or self._failed_in_a_row >= limit:
            raise error
        whole = layout.step_name(self._newest_step)
        self._say(
            f"warning: saving step {step} failed ({error.reason}); training goes on, {whole} is whole and the next "
            f"save tries again ({self._failed_in_a_row} of checkpoint.max_failed_saves={limit})"
        )
        return False
