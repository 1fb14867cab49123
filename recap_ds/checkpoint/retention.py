"""Which checkpoints of a run stay: the last ones, every M-th step, and what ``best`` points at. Pure."""

from collections.abc import Iterable

from recap_ds.config import CheckpointConfig


def steps_let_go(steps: Iterable[int], best: int | None, keep: CheckpointConfig) -> list[int]:
    """Those of ``steps`` that retention no longer keeps, ascending."""
    ordered = sorted(steps)
    kept = {*ordered[-keep.keep_last :], best}
    if keep.keep_every_steps:
        kept |= {step for step in ordered if step % keep.keep_every_steps == 0}
    return [step for step in ordered if step not in kept]
