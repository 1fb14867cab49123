"""Steps that were skipped: for gradients that are not finite, or for a loss spike. Written down, counted, and bounded.

Every rank writes a line of its own about its samples, by one append: no communication.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recap_ds.batch import TransitionBatch
from recap_ds.errors import RunFailed
from recap_ds.files.lines import append_line
from recap_ds.train.logbook import Logbook
from recap_ds.train.progress import Progress
from recap_ds.train.session import Session
from recap_ds.train.step import StepResult

# Of a spike, each rank names so many of its samples, those with the largest loss first.
NUM_NAMED_SAMPLES = 8


def count_skipped(
    session: Session, progress: Progress, logbook: Logbook, micro_batches: Sequence[TransitionBatch], result: StepResult
) -> bool:
    """Take note of how a step ended, the same on every rank; True = so many spikes in a row that something must happen.

    RunFailed where too many steps in a row had gradients that are not finite.
    """
    if result.applied:
        progress.skipped_in_a_row = progress.spikes_in_a_row = 0
        return False
    if result.spike is not None and bool(result.spike.is_spike):  # the step was skipped: waiting costs nothing now
        return _count_spike(session, progress, logbook, micro_batches, result)
    record_skipped(session, progress.step, micro_batches, result)
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    limit = session.plan.config.training.max_skipped_steps
    if progress.skipped_in_a_row >= limit:
        raise RunFailed(
            f"step {progress.step}: {limit} optimizer steps in a row had gradients that are not finite; their "
            f"samples are in {session.plan.run.skipped}. Lower the learning rate or check them; checkpoints are safe"
        )
    return False


def _count_spike(
    session: Session, progress: Progress, logbook: Logbook, micro_batches: Sequence[TransitionBatch], result: StepResult
) -> bool:
    record_spike(session, progress.step, micro_batches, result)
    progress.spikes += 1
    progress.spikes_in_a_row += 1
    limit = session.plan.config.training.spike_max_in_a_row
    logbook.say(
        f"warning: step {progress.step} was skipped: its loss {result.spike.loss.item():.4g} is above "
        f"{result.spike.bound.item():.4g} ({progress.spikes_in_a_row} of training.spike_max_in_a_row={limit}); "
        f"its samples are in {session.plan.run.spikes}"
    )
    return progress.spikes_in_a_row >= limit


def record_skipped(session: Session, step: int, micro_batches: Sequence[TransitionBatch], result: StepResult) -> None:
    """Append this rank's samples of a step without finite gradients to skipped.jsonl, the suspects by name."""
    slots = torch.cat([batch.slot for batch in micro_batches])
    suspects = slots[~result.losses_finite.cpu()].numpy()
    facts = {"suspects": name_samples(session, suspects, "loss not finite")}
    append_line(session.plan.run.skipped, _line(session, step, slots, facts))


def record_spike(session: Session, step: int, micro_batches: Sequence[TransitionBatch], result: StepResult) -> None:
    """Append this rank's samples of a spike to spikes.jsonl, those with the largest loss by name."""
    slots = torch.cat([batch.slot for batch in micro_batches])
    losses = result.sample_losses.cpu().double()
    worst = losses.argsort(descending=True, stable=True)[:NUM_NAMED_SAMPLES]
    names = name_samples(session, slots[worst].numpy(), "loss spike")
    facts = {
        "loss": result.spike.loss.item(),
        "bound": result.spike.bound.item(),
        "worst": [{"sample": name, "loss": loss} for name, loss in zip(names, losses[worst].tolist(), strict=True)],
    }
    append_line(session.plan.run.spikes, _line(session, step, slots, facts))


def _line(session: Session, step: int, slots: torch.Tensor, facts: dict[str, Any]) -> str:
    place = {"step": step, "rank": session.runtime.info.rank}
    return json.dumps(place | {"first_slot": int(slots.min()), "last_slot": int(slots.max())} | facts)


def name_samples(session: Session, slots: np.ndarray, what: str) -> list[str]:
    """Shard and key of the samples in ``slots``."""
    return session.plan.dataset.names(slots, what)
