"""What an environment is to everything that acts in one: a seeded world with a state, pictures on demand and a clock.

``step`` never renders: pictures are made when ``images`` is called, which the software renderers of machines without a
GPU make by far the most expensive call here. Time limits are kept by whoever plays the episode (``max_steps``).

    S, A state and action dims   P picture side in pixels
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recap_ds.errors import UsageError


@dataclass(frozen=True)
class EnvSpec:
    """What stays the same over all episodes. ``tasks``: identifier -> what the policy is told."""

    name: str
    tasks: dict[str, str]
    cameras: tuple[str, ...]  # by the names the policy knows them under
    image_size: int  # P
    state_dim: int
    action_low: np.ndarray  # [A]
    action_high: np.ndarray  # [A]
    fps: float
    max_steps: int
    has_expert: bool
    gripper_dim: int | None = None  # the action dim that closes a gripper: low = open, high = closed
    downward_dims: tuple[int, ...] = ()  # action dims that grow towards the bottom of the picture

    @property
    def action_dim(self) -> int:
        return len(self.action_low)


class StepResult(NamedTuple):
    reward: float  # the environment's own
    success: bool
    terminated: bool  # True = the task ended, in success or failure; a time limit does not end it
    truncated: bool = False  # True = the world goes no further (a limit of its own), and the task had not ended


class Environment(ABC):
    """One world in one process. An episode is a pure function of (seed, task, actions)."""

    spec: EnvSpec

    @abstractmethod
    def reset(self, seed: int, task: str) -> None: ...

    @abstractmethod
    def step(self, action: np.ndarray) -> StepResult:
        """``action`` [A], within the bounds."""

    @abstractmethod
    def state(self) -> np.ndarray:
        """[S] float32."""

    @abstractmethod
    def images(self) -> dict[str, np.ndarray]:
        """camera -> uint8 [P, P, 3], upright; renders."""

    def close(self) -> None:
        """Free what the process would not free by ending."""
        return

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, [A]; only where ``spec.has_expert``."""
        raise UsageError(f"--env {self.spec.name}: has no scripted expert")

    def rest_action(self) -> np.ndarray:
        """[A], leaves the robot where it is; the middle of the range where actions are relative."""
        return (self.spec.action_low + self.spec.action_high) / 2

    def progress(self) -> float:
        """Rises as the task gets done, in units of its own; where it stalls an expert may take over."""
        raise UsageError(f"--env {self.spec.name}: does not measure progress; set collect.progress=value")


def observe(env: Environment, images: dict[str, np.ndarray], prompt: str) -> dict[str, np.ndarray | str]:
    """An observation under the keys that a policy reads (``models/observation.py``)."""
    pictures = {f"observation/{camera}": picture for camera, picture in images.items()}
    return {**pictures, "observation/state": env.state(), "prompt": prompt}


def choose_views(name: str, views: dict[str, str] | None, known: tuple[str, ...], default: str) -> dict[str, str]:
    """``views`` checked against the cameras that the environment has."""
    chosen = views or {default: default}
    for camera, source in chosen.items():
        if source not in known:
            raise UsageError(
                f"--env {name}: has no camera '{source}' ({', '.join(known)}); "
                f"say which one is the policy's with env.cameras.{camera}=NAME"
            )
    return chosen
