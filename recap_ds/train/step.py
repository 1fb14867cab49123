"""One optimizer step: micro-batches in, gradients applied or skipped on every rank together.

The order is DeepSpeed's law (``distributed/engine.py``): one forward per backward, stale gradients cleared after the
boundary, targets and averages moved only where the step was applied. Thresholds used by step s are those of the
advantages up to s - 1.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import AdvantageRing, AdvantageScale, forced_positive
from recap_ds.batch import TransitionBatch, to_device
from recap_ds.checkpoint.tile_file import EMA, TARGET
from recap_ds.data.draws import identity_of
from recap_ds.distributed.engine import global_grad_norm, grad_norms_by_group, step_was_applied, zero_stale_gradients
from recap_ds.distributed.reduce import gather_flat, sum_over_ranks
from recap_ds.models.losses import LossNormalizers, TrainOutput, local_counts, normalizers
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.optim import learning_rate_factor, set_learning_rates
from recap_ds.train.session import Session
from recap_ds.train.spikes import SpikeJudgement, poisoned


class StepResult(NamedTuple):
    applied: bool
    batch: TransitionBatch  # the last micro-batch, on the device, and what came of it
    output: TrainOutput
    sample_losses: Tensor  # [micro-batches x B] of all heads, in the order they were given
    grad_norm: Tensor  # before clipping; inf where skipped
    group_norms: Tensor | None  # by optimizer group, where asked for
    spike: SpikeJudgement | None = None  # where the run has a guard

    @property
    def losses_finite(self) -> Tensor:
        """[micro-batches x B] bool; False marks a suspect."""
        return self.sample_losses.isfinite()


def take_step(
    session: Session,
    step: int,
    micro_batches: Sequence[TransitionBatch],
    metrics: StepMetrics,
    with_group_norms: bool,
) -> StepResult:
    """Collective: every rank must call."""
    engine, config = session.engine, session.plan.config
    factor = learning_rate_factor(step, config.training)
    set_learning_rates(engine.optimizer.param_groups, session.peak_rates, factor)
    scale = advantage_scale(session)
    counts = step_normalizers(micro_batches, session.runtime.device)
    warming_up = step < config.indicator_warmup_steps
    if config.has_dropout:
        # Dropout is the one thing drawn from torch's own generator: a function of (seed, step, rank), so that ranks
        # differ and a resumed run draws what an uninterrupted one would have.
        torch.manual_seed(identity_of("dropout", config.training.seed, step, session.runtime.info.rank))

    rows, sample_losses, step_losses, spike = [], [], [], None
    for number, host_batch in enumerate(micro_batches):
        batch = to_device(host_batch, session.runtime.device)
        output = engine(batch, "train", scale, counts, warming_up)
        last, loss = number == len(micro_batches) - 1, output.loss
        step_losses.append(loss.detach())
        if last and session.spikes is not None:
            spike = session.spikes.judge(step_losses)
            loss = poisoned(loss, spike)
        engine.backward(loss)
        group_norms = grad_norms_by_group(engine) if last and with_group_norms else None
        engine.step()
        output = output._replace(loss=output.loss.detach())
        metrics.add(batch, output)
        if session.ring is not None:
            rows.append(ring_rows(batch, output, config.recap.demos))
        heads = (output.policy_loss, output.q_loss, output.v_loss, output.action_token_loss)
        losses = [loss for loss in heads if loss is not None]
        sample_losses.append(torch.stack(losses).detach().sum(dim=0))
    zero_stale_gradients(engine)
    applied = step_was_applied(engine)
    metrics.end_step(applied)
    if applied:
        _follow(session, rows)
        if spike is not None:
            session.spikes.remember(spike)
    return StepResult(applied, batch, output, torch.cat(sample_losses), global_grad_norm(engine), group_norms, spike)


def advantage_scale(session: Session) -> AdvantageScale:
    """Thresholds and spread of the advantages: of those seen so far, or of the labels."""
    if session.ring is None:
        return session.fixed_scale
    recap = session.plan.config.recap
    return session.ring.scale(recap.positive_fraction, recap.advantage_window_min)


def step_normalizers(micro_batches: Sequence[TransitionBatch], device: torch.device) -> LossNormalizers:
    """Valid counts of the whole step, as a mean over micro-batches and ranks; the host's own masks, so nothing waits.

    Collective: every rank must call.
    """
    counts = torch.stack([local_counts(batch) for batch in micro_batches]).sum(dim=0)
    shares = torch.cat([counts, torch.tensor([float(len(micro_batches))])]).to(device, non_blocking=True)
    total = sum_over_ranks(shares)
    return normalizers(total[:-1] / total[-1])


def ring_rows(batch: TransitionBatch, output: TrainOutput, demos: Literal["positive", "labelled"]) -> Tensor:
    """[B, 4]: advantage, task, eligible, slot. Float64 holds ids and slots (below 2^53) exactly: one gather does."""
    eligible = batch.td_valid & batch.sample_valid & ~forced_positive(batch.source, demos)
    columns = (output.advantage, batch.task, eligible, batch.slot)
    return torch.stack([column.double() for column in columns], dim=1)


def append_advantages(ring: AdvantageRing, rows: Tensor) -> None:
    """``rows`` [n, 4]: those of ``ring_rows``, of every rank and micro-batch of a step."""
    advantage, task, eligible, slot = rows.unbind(dim=1)
    ring.append(advantage.float(), task.long(), eligible.bool(), slot.long())


def _follow(session: Session, rows: Sequence[Tensor]) -> None:
    """After an applied step: targets, averages and the advantage ring, those there are, move on.

    Collective: every rank must call.
    """
    config = session.plan.config
    if TARGET in session.shadows:
        session.shadows[TARGET].lerp(config.iql.target_update_rate)
    if config.training.ema_decay is not None:
        session.shadows[EMA].lerp(1.0 - config.training.ema_decay)
    if session.ring is not None:
        append_advantages(session.ring, gather_flat(torch.cat(list(rows)).flatten()).view(-1, 4))
