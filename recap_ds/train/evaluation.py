"""Held-out evaluation between optimizer steps, through the engine, with the averaged weights where there are any.

It leaves the training trace bit for bit as it was: no random number is drawn from a generator that training uses, the
online weights return exactly, and ZeRO-3 sees one forward without a backward.
"""

import contextlib

import torch

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import TransitionBatch
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.evaluate.offline import flat_metrics, summarise
from recap_ds.evaluate.records import collect_records
from recap_ds.models.losses import EvaluationOutput, normalizers
from recap_ds.train.session import Session


def evaluate_held_out(session: Session, batches: EvaluationBatches) -> dict[str, float]:
    """eval/... metrics of the current weights. Collective: every rank must call."""
    plan, engine, device = session.plan, session.engine, session.runtime.device
    # The forward takes the same arguments in both modes; evaluation reads neither of these.
    scale = AdvantageScale(*(torch.zeros(len(plan.tasks), device=device) for _ in range(3)))
    unused = normalizers(torch.ones(2, device=device))

    def forward(batch: TransitionBatch) -> EvaluationOutput:
        return engine(batch, "evaluate", scale, unused, False)

    averaged = session.shadows["ema"].swapped_into_online() if "ema" in session.shadows else contextlib.nullcontext()
    engine.eval()
    with averaged:
        records = collect_records(forward, batches, device)
    engine.train()
    return flat_metrics(summarise(records, plan.config, plan.tasks, plan.normalizer))
