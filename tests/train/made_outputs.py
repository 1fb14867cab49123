"""Outputs of a training forward without a model, and the sums of metrics computed again in plain Python."""

import math

import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.losses import TrainOutput


def made_output(config: PiStarRECAPConfig, batch: TransitionBatch, seed: int) -> TrainOutput:
    """Random numbers where a model's would be; weights are the sources', as in conditioned extraction."""
    generator = torch.Generator().manual_seed(seed)
    size = len(batch.task)

    def column() -> torch.Tensor:
        return torch.rand(size, generator=generator)

    q, v = -column(), -column()
    td = batch.td_valid.float()
    return TrainOutput(
        loss=torch.rand((), generator=generator),
        policy_loss=column(),
        q_loss=column() * td,
        v_loss=column() * td,
        q=q,
        v=v,
        advantage=q - v,
        td_error=(column() - 0.5) * td,
        target_gap=column(),
        weight=torch.tensor(config.recap.source_weights)[batch.source],
        indicator=torch.randint(0, len(INDICATOR_IDS), (size,), generator=generator),
    )


class Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0

    def add(self, value: float, count: float = 1.0) -> None:
        self.total += value * count
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


def expected_means(config: PiStarRECAPConfig, batches: list, outputs: list, tasks: list[str]) -> dict[str, float]:
    """Sample by sample, element by element: what StepMetrics should say of these micro-batches."""
    means: dict[str, Mean] = {}

    def add(name: str, value: float, count: float = 1.0) -> None:
        means.setdefault(name, Mean()).add(value, count)

    always = ("demo", "intervention") if config.recap.demos == "positive" else ("intervention",)
    for batch, output in zip(batches, outputs, strict=True):
        add("loss", output.loss.item())
        for row in range(len(batch.task)):
            source = ("demo", "auto", "intervention")[batch.source[row]]
            task = tasks[batch.task[row]]
            elements = 0
            for frame in range(config.chunk_size):
                for dim in range(config.max_action_dim):
                    elements += bool(batch.action_valid[row, frame]) and bool(batch.action_dim_mask[row, dim])
            for place in ("", f"{source}/"):
                add(f"{place}policy_loss", output.policy_loss[row].item(), elements * config.model.flow_samples)
                if batch.td_valid[row]:
                    add(f"{place}q_loss", output.q_loss[row].item())
                    add(f"{place}v_loss", output.v_loss[row].item())
            add(f"{source}/policy_weight", output.weight[row].item())
            add("indicator_dropped_fraction", float(batch.indicator_dropped[row]))
            add(f"forced_fraction/{task}", float(source in always))
            if batch.td_valid[row]:
                add("target_gap", output.target_gap[row].item())
                add("td_error", abs(output.td_error[row].item()))
            indicator = output.indicator[row].item()
            if source not in always and indicator != INDICATOR_IDS["none"]:
                add(f"positive_fraction/{task}", float(indicator == INDICATOR_IDS["positive"]))
    return {f"train/{name}": mean.value for name, mean in means.items()}
