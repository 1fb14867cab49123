"""Training metrics: summed on the device every step, read on the host only when they are logged.

A figure over samples is a sum divided by a count, both over all ranks and all applied steps since the last line.

    B samples of a micro-batch   K tasks   S sources (demo, auto, intervention)
"""

import math
from typing import Literal

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS, forced_positive
from recap_ds.algo.iql import MAX_EXTRACTION_WEIGHT
from recap_ds.batch import SOURCE_IDS, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.reduce import gather_flat, sum_over_ranks
from recap_ds.models.losses import TrainOutput, count_flow_elements, value_mask

SOURCE_COLUMNS = (
    "samples",
    "flow_sum",
    "flow_elements",
    "q_loss_sum",
    "v_loss_sum",
    "td_samples",
    "v_samples",
    "weight_sum",
    "action_tokens",
    "action_token_loss_sum",
    "action_tokens_correct",
)
TASK_COLUMNS = ("labelled", "labelled_positive", "forced", "samples")
# "replaced" is last: it is the one sum that a skipped step adds to.
SCALAR_COLUMNS = (
    "loss",
    "micro_batches",
    "clipped",
    "target_gap_sum",
    "td_error_sum",
    "value_error_sum",
    "indicator_dropped",
    "replaced",
)
QUANTILES = (0.05, 0.5, 0.95)


class StepMetrics:
    """Accumulates between two log lines."""

    def __init__(
        self,
        config: PiStarRECAPConfig,
        tasks: list[str],
        device: torch.device,
        corrections: Literal["positive", "labelled"] = "positive",
    ):
        """``corrections``: what they are in the labels that the run reads."""
        self._config, self._corrections = config, corrections
        self._tasks = tasks
        self._shapes = (len(SOURCE_IDS), len(SOURCE_COLUMNS)), (len(tasks), len(TASK_COLUMNS)), (1, len(SCALAR_COLUMNS))
        num_sums = sum(map(math.prod, self._shapes))
        self._kept = torch.zeros(num_sums, dtype=torch.float64, device=device)  # of the steps that were applied
        self._step = torch.zeros_like(self._kept)  # of the step under way

    @torch.no_grad()
    def add(self, batch: TransitionBatch, output: TrainOutput) -> None:
        """One micro-batch of the step under way. Nothing here waits for the device."""
        source_sums, task_sums, scalar_sums = self._tables(self._step)
        flow_elements = count_flow_elements(batch)
        td, action_tokens = batch.td_valid.double(), batch.action_token_mask.sum(dim=1).double()
        nothing = torch.zeros_like(td)

        def column(values: Tensor | None) -> Tensor:
            return nothing if values is None else values.double()

        columns = torch.stack(
            [
                batch.sample_valid.double(),
                column(output.policy_loss) * flow_elements,
                flow_elements.double(),
                column(output.q_loss),
                column(output.v_loss),
                td,
                value_mask(self._config, batch).double(),
                column(output.weight),
                action_tokens,
                column(output.action_token_loss) * action_tokens,
                column(output.action_token_accuracy) * action_tokens,
            ],
            dim=1,
        )
        source_sums.index_add_(0, batch.source, columns)
        if output.indicator is not None:
            forced = forced_positive(batch.source, self._config.recap.demos, self._corrections)
            labelled = ~forced & (output.indicator != INDICATOR_IDS["none"])
            positive = labelled & (output.indicator == INDICATOR_IDS["positive"])
            task_columns = torch.stack([labelled, positive, forced, batch.sample_valid], dim=1).double()
            task_sums.index_add_(0, batch.task, task_columns)
        # From Python numbers: a table made here would be copied to the device, and the host would wait for it.
        weights = enumerate(self._config.recap.source_weights)
        source_weight = sum(weight * (batch.source == source) for source, weight in weights)
        clipped = column(output.weight) >= (source_weight * MAX_EXTRACTION_WEIGHT).double()
        scalar_sums[0] += torch.stack(
            [
                output.loss.detach().double(),
                torch.ones((), dtype=torch.float64, device=td.device),
                (clipped & (source_weight > 0)).double().sum(),
                (column(output.target_gap) * td).sum(),
                (column(output.td_error).abs() * td).sum(),
                column(output.value_error).sum(),
                batch.indicator_dropped.double().sum(),
                batch.replaced.double().sum(),
            ]
        )

    def end_step(self, applied: bool) -> None:
        """Keep the step under way; of a skipped one, whose losses may be NaN, only how many samples were replaced."""
        if applied:
            self._kept += self._step
        else:
            self._kept[-1] += self._step[-1]
        self._step.zero_()

    @torch.no_grad()
    def summarise(self, batch: TransitionBatch, output: TrainOutput) -> dict[str, float]:
        """All steps since the last call, then start again; quantiles are of the given, last micro-batch.

        NaN where there was nothing to count. Collective: every rank must call.
        """
        source, task, scalar = self._tables(sum_over_ranks(self._kept).cpu())
        totals = dict(zip(SCALAR_COLUMNS, scalar[0].tolist(), strict=True))
        metrics = _losses(source, totals, output)
        for name, index in SOURCE_IDS.items():
            row = dict(zip(SOURCE_COLUMNS, source[index].tolist(), strict=True))
            metrics |= {f"train/{name}/{key}": value for key, value in _source_metrics(row, output).items()}
        for name, values in zip(self._tasks, task.tolist(), strict=True):
            row = dict(zip(TASK_COLUMNS, values, strict=True))
            if row["labelled"]:
                metrics[f"train/positive_fraction/{name}"] = row["labelled_positive"] / row["labelled"]
            if row["samples"]:
                metrics[f"train/forced_fraction/{name}"] = row["forced"] / row["samples"]
        metrics |= _distributions(value_mask(self._config, batch), output)
        self._kept.zero_()
        return metrics

    def _tables(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of a flat vector of sums: [S, SOURCE_COLUMNS], [K, TASK_COLUMNS], [1, SCALAR_COLUMNS]."""
        parts = flat.split([math.prod(shape) for shape in self._shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))


def _losses(source: Tensor, totals: dict[str, float], output: TrainOutput) -> dict[str, float]:
    """Figures of what the stage has, by what ``output`` holds."""
    whole = dict(zip(SOURCE_COLUMNS, source.sum(dim=0).tolist(), strict=True))
    td, samples = whole["td_samples"], whole["samples"]
    figures = {
        "policy_loss": (output.policy_loss, _ratio(whole["flow_sum"], whole["flow_elements"])),
        "q_loss": (output.q_loss, _ratio(whole["q_loss_sum"], td)),
        "v_loss": (output.v_loss, _ratio(whole["v_loss_sum"], whole["v_samples"])),
        "target_gap": (output.target_gap, _ratio(totals["target_gap_sum"], td)),
        "td_error": (output.td_error, _ratio(totals["td_error_sum"], td)),
        "value_mae": (output.value_error, _ratio(totals["value_error_sum"], whole["v_samples"])),
        "weight_clip_fraction": (output.weight, _ratio(totals["clipped"], samples)),
        "action_token_loss": (
            output.action_token_loss,
            _ratio(whole["action_token_loss_sum"], whole["action_tokens"]),
        ),
        "action_token_accuracy": (
            output.action_token_accuracy,
            _ratio(whole["action_tokens_correct"], whole["action_tokens"]),
        ),
        "indicator_dropped_fraction": (output.indicator, _ratio(totals["indicator_dropped"], samples)),
    }
    return {
        "train/loss": _ratio(totals["loss"], totals["micro_batches"]),
        **{f"train/{name}": figure for name, (part, figure) in figures.items() if part is not None},
        "data/replaced_samples": totals["replaced"],
    }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _source_metrics(row: dict[str, float], output: TrainOutput) -> dict[str, float]:
    figures = {
        "policy_weight": (output.weight, "weight_sum", "samples"),
        "policy_loss": (output.policy_loss, "flow_sum", "flow_elements"),
        "q_loss": (output.q_loss, "q_loss_sum", "td_samples"),
        "v_loss": (output.v_loss, "v_loss_sum", "v_samples"),
        "action_token_loss": (output.action_token_loss, "action_token_loss_sum", "action_tokens"),
        "action_token_accuracy": (output.action_token_accuracy, "action_tokens_correct", "action_tokens"),
    }
    present = {name: (total, count) for name, (part, total, count) in figures.items() if part is not None}
    means = {name: row[total] / row[count] for name, (total, count) in present.items() if row[count]}
    return {"samples": row["samples"], **means}


def _distributions(valid: Tensor, output: TrainOutput) -> dict[str, float]:
    """Mean, std and quantiles of Q, V and A over all ranks' last micro-batch, where ``valid`` [B]."""
    parts = {"q": output.q, "v": output.v, "advantage": output.advantage}
    parts = {name: values for name, values in parts.items() if values is not None}
    if not parts:
        return {}
    rows = torch.stack([*parts.values(), valid.to(output.v.dtype)], dim=1)
    *columns, valid = gather_flat(rows.flatten()).view(-1, len(parts) + 1).cpu().double().unbind(dim=1)
    metrics = {}
    for name, values in zip(parts, columns, strict=True):
        held = values[valid.bool() & values.isfinite()]
        if len(held):
            metrics[f"train/{name}/mean"] = held.mean().item()
            metrics[f"train/{name}/std"] = held.std(correction=0).item()
            for level, value in zip(QUANTILES, held.quantile(held.new_tensor(QUANTILES)).tolist(), strict=True):
                metrics[f"train/{name}/p{round(level * 100):02d}"] = value
    return metrics
