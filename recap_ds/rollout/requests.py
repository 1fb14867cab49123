"""What environments ask of whoever acts, and the answers: the seam between simulators and the model."""

from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    row: int  # of the padded batch
    number: int  # of the episode; with the frame, what its noise is keyed by
    arm: int
    frame: int
    observation: dict[str, np.ndarray | str]
    wants_value: bool


class Decision(NamedTuple):
    actions: np.ndarray  # [K, A] in the robot's units
    value: float | None  # of the observation, by the critic; None where nobody asked or there is no critic
