"""Records whose figures are known: what a model would have said, without a model.

Two tasks, the three sources in turn, chunks of H = 3 frames and A = 4 dims of which the robot has two.
"""

from typing import Any

import numpy as np

from recap_ds.batch import OUTCOME_IDS
from recap_ds.data.baseline import MeanActions
from recap_ds.evaluate.records import Records
from recap_ds.processing.normalize import Affine, Normalizer

HORIZON, WIDTH, ROBOT_DIMS = 3, 4, 2
CENTER, SCALE = np.array([1.0, -2.0]), np.array([2.0, 10.0])  # robot units = normalised * SCALE + CENTER


def normalizer() -> Normalizer:
    actions = Affine(CENTER.astype(np.float32), SCALE.astype(np.float32), WIDTH)
    return Normalizer("mean_std", state=actions, actions=actions)


def normalised(robot: np.ndarray) -> np.ndarray:
    """[..., 2] in robot units -> [..., 4], padded."""
    values = (robot - CENTER) / SCALE
    return np.concatenate([values, np.zeros_like(values)], axis=-1)


def make_records(num_samples: int = 12, seed: int = 0, **columns: Any) -> Records:
    """Random, complete records; ``columns`` replace some of them."""
    generator = np.random.default_rng(seed)
    row = np.arange(num_samples)
    mask = np.zeros((num_samples, HORIZON, WIDTH), bool)
    for number in row:
        mask[number, : 1 + number % HORIZON, :ROBOT_DIMS] = True
    true = normalised(generator.normal(size=(num_samples, HORIZON, ROBOT_DIMS)))
    records = Records(
        task=row // 3 % 2,
        source=row % 3,
        control=row % 2,
        outcome=np.where(row % 2, OUTCOME_IDS["success"], OUTCOME_IDS["failure"]),
        mc_return=-generator.random(num_samples),
        mc_valid=np.ones(num_samples, bool),
        td_valid=row % 4 != 3,
        q_loss=generator.random(num_samples),
        v_loss=generator.random(num_samples),
        q=-generator.random(num_samples),
        v=-generator.random(num_samples),
        v_shuffled=-generator.random(num_samples),
        flow_loss=generator.random((num_samples, 3)) + 0.5,
        actions=true + generator.normal(size=true.shape),
        unconditioned_actions=true + generator.normal(size=true.shape),
        true_actions=true,
        action_mask=mask,
    )
    return records._replace(**columns)


def constant(values: np.ndarray) -> MeanActions:
    """The same weight for every source; ``values`` [2 tasks, 3 sources, 2 dims] in robot units."""
    return MeanActions(values, np.ones(values.shape[:2]))
