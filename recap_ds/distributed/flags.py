"""What every rank has to know at the same step, without waiting for it: a few small numbers, agreed a step late.

Each rank posts its numbers once per step; what comes back is the largest that any rank posted at the step before. That
exchange ran on the hosts, through a group of its own, while the device took the step, so it costs neither a device sync
nor the latency of the network. All ranks read the same at the same step: what they decide by it, they decide together.

Does not know what the numbers lead to: ``train/`` stops by them, ``checkpoint/`` commits by them.
"""

from typing import NamedTuple

import torch
import torch.distributed

from recap_ds.distributed.reduce import world_size


class StepFlags(NamedTuple):
    """Zero says nothing; of all ranks' values the largest counts."""

    stop: int = 0  # why this rank wants to stop, see train/stopping.py
    writing: int = 0  # 1 = a checkpoint is still being written in the background


class FlagExchange:
    """Collective: every rank must build it, call ``exchange`` equally often, and close it (``with`` does).

    After an error there is nobody left to agree with: ``with`` then leaves it as it is.
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if world_size() > 1 else None
        self._posted = torch.zeros(len(StepFlags._fields), dtype=torch.int64)
        self._work: torch.distributed.Work | None = None

    def exchange(self, mine: StepFlags) -> StepFlags:
        """Post ``mine``; returns what was agreed of the previous call's, nothing at the first.

        Collective: every rank must call.
        """
        agreed = self._collect()
        self._posted = torch.tensor(mine, dtype=torch.int64)
        if self._group is not None:
            self._work = torch.distributed.all_reduce(
                self._posted, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
            )
        return agreed

    def close(self) -> None:
        """Wait for what is under way and leave the group. Collective: every rank must call."""
        self._collect()
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def __enter__(self) -> "FlagExchange":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def _collect(self) -> StepFlags:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return StepFlags(*self._posted.tolist())
