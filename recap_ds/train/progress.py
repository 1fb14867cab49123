"""All that a run remembers beside tensors; the rest is the engine's tiles, the shadows and the advantage ring."""

from dataclasses import dataclass, field
from typing import Any

from recap_ds.train.gate import GateState


@dataclass
class Progress:
    """What a checkpoint remembers of the loop; plain JSON."""

    step: int = 0  # optimizer steps taken, applied or skipped
    next_slot: int = 0
    samples_seen: int = 0
    replaced_samples: int = 0
    skipped_steps: int = 0  # for gradients that were not finite
    skipped_in_a_row: int = 0
    spikes: int = 0  # steps skipped for their loss
    spikes_in_a_row: int = 0
    rollbacks: int = 0
    gate: GateState = field(default_factory=GateState)
    wandb_id: str | None = None

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Progress":
        """From a checkpoint; those of before there were gates knew the loss alone."""
        gate = state.get("gate") or {"best": state.get("best_loss")}
        others = {name: value for name, value in state.items() if name not in ("gate", "best_loss")}
        return cls(**others, gate=GateState(**gate))

    def become(self, other: "Progress") -> None:
        """Take over all that ``other`` remembers."""
        for name, value in vars(other).items():
            setattr(self, name, value)
