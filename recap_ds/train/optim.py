"""Learning rates: linear warm-up, then a cosine, as a pure function of the step.

A pure function has no state to save: a resumed run cannot be out of step with its schedule.
"""

import math

from recap_ds.config import TrainingConfig


def learning_rate_factor(step: int, training: TrainingConfig) -> float:
    """Share of the peak rate for optimizer step ``step`` (0 is the first), from above 0 to the final fraction."""
    if step < training.num_warmup_steps:
        return (step + 1) / (training.num_warmup_steps + 1)
    decay_steps = training.num_training_steps - training.num_warmup_steps
    progress = min((step - training.num_warmup_steps) / max(decay_steps - 1, 1), 1.0)
    floor = training.final_learning_rate_fraction
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(param_groups: list[dict], peaks: dict[str, float], factor: float) -> None:
    for group in param_groups:
        group["lr"] = peaks[group["name"]] * factor
