"""Which held-out figure decides what is best, and when a run has stopped getting better.

Pure functions of ``Progress``-like state, so that an interrupted run decides as one that was not.
"""

import math
from dataclasses import dataclass

from recap_ds.config import PiStarRECAPConfig


@dataclass(frozen=True)
class Gate:
    metric: str
    lower_is_better: bool

    def improves(self, figure: float, best: float | None) -> bool:
        """NaN and infinity are never best."""
        if not math.isfinite(figure):
            return False
        return best is None or (figure < best if self.lower_is_better else figure > best)


GATES = {
    "loss": Gate("eval/loss", lower_is_better=True),
    "nll": Gate("eval/value_nll", lower_is_better=True),
    "mae": Gate("eval/value_mae", lower_is_better=True),
    "rank_correlation": Gate("eval/value_rank_correlation", lower_is_better=False),
    "separation": Gate("eval/value_separation", lower_is_better=False),
    "shuffled_image_gap": Gate("eval/value_shuffled_image_gap", lower_is_better=False),
}


@dataclass
class GateState:
    """What the gate has seen; plain JSON, kept in checkpoints."""

    gate: str = "loss"
    best: float | None = None
    evaluations_since_best: int = 0

    def judge(self, config: PiStarRECAPConfig, evaluation: dict[str, float]) -> bool:
        """True = the best evaluation so far, which is then remembered.

        A figure that the held-out samples cannot give (no failures among them, say) is no figure: it is never best,
        and it stops no run.
        """
        if self.gate != config.evaluation.gate:  # the setting may change between two starts of a run
            self.gate, self.best, self.evaluations_since_best = config.evaluation.gate, None, 0
        gate = GATES[self.gate]
        if gate.metric not in evaluation:
            return False
        if gate.improves(evaluation[gate.metric], self.best):
            self.best, self.evaluations_since_best = evaluation[gate.metric], 0
            return True
        self.evaluations_since_best += 1
        return False

    def gives_up(self, config: PiStarRECAPConfig) -> bool:
        """True = ``training.early_stop_evaluations`` evaluations brought nothing better."""
        patience = config.training.early_stop_evaluations
        same_gate = self.gate == config.evaluation.gate
        return patience is not None and same_gate and self.evaluations_since_best >= patience
