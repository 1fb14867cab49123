"""Held-out evaluation between optimizer steps, through the engine, with the averaged weights where there are any.

It leaves the training trace bit for bit as it was: no random number is drawn from a generator that training uses, the
online weights return exactly, and ZeRO-3 sees one forward without a backward.
"""

import contextlib
from functools import cached_property

import torch

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import TransitionBatch
from recap_ds.data.baseline import MeanActions, mean_actions
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.evaluate.offline import flat_metrics, summarise
from recap_ds.evaluate.records import collect_records
from recap_ds.models.losses import EvaluationOutput, LossNormalizers, normalizers
from recap_ds.train.session import Session


class HeldOutEvaluation:
    """The held-out batches of this rank and what their figures are compared with."""

    def __init__(self, session: Session):
        plan = session.plan
        self._session = session
        self.batches = EvaluationBatches(
            plan.dataset.assembler,
            plan.config,
            rank=plan.info.rank,
            world=plan.info.world,
            damage_log=plan.run.damaged,
        )

    @property
    def num_samples(self) -> int:
        return len(self.batches.samples)

    @cached_property
    def _constant(self) -> MeanActions:
        # When first needed, and not at all where nothing is held out: it reads hundreds of samples.
        plan = self._session.plan
        data = plan.config.data
        return mean_actions(plan.dataset.assembler.shard_set, data.held_out_fraction, plan.config.training.seed)

    def run(self) -> dict[str, float]:
        """eval/... metrics of the current weights. Collective: every rank must call."""
        plan, engine, device = self._session.plan, self._session.engine, self._session.runtime.device
        shadows = self._session.shadows
        # The forward takes the same arguments in both modes; evaluation reads neither of these.
        scale = AdvantageScale(*(torch.zeros(len(plan.tasks), device=device) for _ in range(3)))
        unused = normalizers(torch.ones(len(LossNormalizers._fields), device=device))

        def forward(batch: TransitionBatch) -> EvaluationOutput:
            self._session.watch.mark("held-out evaluation")
            return engine(batch, "evaluate", scale, unused, False)

        averaged = shadows["ema"].swapped_into_online() if "ema" in shadows else contextlib.nullcontext()
        engine.eval()
        with averaged:
            records = collect_records(forward, self.batches, device)
        engine.train()
        constant = self._constant if "action_expert" in plan.config.heads else None
        return flat_metrics(summarise(records, plan.config, plan.tasks, plan.normalizer, constant))
