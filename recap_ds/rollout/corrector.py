"""Whoever corrects a policy: when they take over, what they do, when they hand back. Here the scripted expert; a person
is in ``rollout/keyboard.py``.

    A action dims   P picture side
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from recap_ds.config import CollectConfig
from recap_ds.envs.interface import Environment
from recap_ds.rollout.takeover import Takeover


class Moment(NamedTuple):
    """Where an episode stands: o_frame is there, its action is not."""

    frame: int
    prompt: str
    pictures: Callable[[], dict[str, np.ndarray]]  # camera -> uint8 [P, P, 3]; may render
    last_action: np.ndarray | None  # [A], of frame - 1


class Corrector(ABC):
    """One for all episodes of an environment process. Takes over and hands back as often as it likes."""

    @abstractmethod
    def begin(self, moment: Moment) -> bool:
        """A new episode. True = takes over before the policy's first action."""

    @abstractmethod
    def watch(self, moment: Moment, value: float | None, num_frames: int) -> bool:
        """The policy has acted. True = takes over.

        ``value``: a critic's, of the observation that the policy acts on next, which covers ``num_frames``; None after
        every frame where no critic is asked.
        """

    @abstractmethod
    def act(self, moment: Moment) -> np.ndarray | None:
        """The next action [A], while in control; None = the policy acts again."""

    def close(self) -> None:
        """No episode follows."""
        return


class ScriptedCorrector(Corrector):
    """The environment's expert: takes over where progress stalls, and hands back after a fixed number of frames."""

    def __init__(self, env: Environment, settings: CollectConfig) -> None:
        self._env, self._settings = env, settings

    def begin(self, moment: Moment) -> bool:
        self._takeover = Takeover(self._settings)
        self._frames_left = self._settings.correction_frames
        return False

    def watch(self, moment: Moment, value: float | None, num_frames: int) -> bool:
        return self._takeover.stalls(self._env.progress() if value is None else value, num_frames)

    def act(self, moment: Moment) -> np.ndarray | None:
        if self._frames_left == 0:
            self._takeover.hand_back()
            self._frames_left = self._settings.correction_frames
            return None
        self._frames_left -= 1
        return self._env.expert_action()
