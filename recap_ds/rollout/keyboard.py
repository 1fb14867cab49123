"""A person corrects the policy from the keyboard: what keys mean, apart from the window that reads them.

The world runs at its own rate while the policy acts. In the person's hands it stands still until a key is held, so that
nobody's hesitation is recorded as a correction.

    A action dims   P picture side
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from recap_ds.envs.interface import Environment, EnvSpec
from recap_ds.errors import UsageError
from recap_ds.rollout.corrector import Corrector, Moment

# By their names in pygame. (down, up) for one action dim after the other, without the gripper's.
MOVES = (("left", "right"), ("down", "up"), ("f", "r"), ("a", "d"), ("s", "w"), ("q", "e"), ("j", "l"))
TAKE, GRIP, WAIT, LEAVE = "t", "g", "space", "escape"
# A digit is the step size: tenths of half an action dim's range, 0 the whole of it.
DIGITS = "1234567890"
STEP_TENTHS = 5


class Keys(NamedTuple):
    """What was read in one tick of a window."""

    held: frozenset[str] = frozenset()  # at the end of the tick, or pressed in the course of it
    pressed: frozenset[str] = frozenset()
    closed: bool = False  # True = the window was closed


class Window(ABC):
    @abstractmethod
    def tick(self, pictures: dict[str, np.ndarray], lines: list[str]) -> Keys:
        """Show ``pictures`` (uint8 [P, P, 3]) and ``lines`` for one frame's time; what was pressed since the last."""

    @abstractmethod
    def close(self) -> None: ...


class PersonLeft(Exception):
    """The window was closed: nobody is there to correct. What is finished is kept."""


class KeyboardCorrector(Corrector):
    def __init__(self, env: Environment, window: Window) -> None:
        self._env, self._window = env, window
        self._moves = moves_of(env.spec)
        self._half_range = (env.spec.action_high - env.spec.action_low) / 2
        self._acting_keys = {WAIT, *(key for pair in self._moves.values() for key in pair)}
        self._tenths = STEP_TENTHS

    def begin(self, moment: Moment) -> bool:
        self._is_closed = False  # the gripper
        return self._takes(moment)

    def watch(self, moment: Moment, value: float | None, num_frames: int) -> bool:
        return self._takes(moment)

    def act(self, moment: Moment) -> np.ndarray | None:
        while True:
            keys = self._tick(moment, acts=True)
            if TAKE in keys.pressed:
                return None
            if self._grips(keys) or keys.held & self._acting_keys:
                return self._action(keys)

    def close(self) -> None:
        self._window.close()

    def _takes(self, moment: Moment) -> bool:
        dim = self._env.spec.gripper_dim
        if dim is not None and moment.last_action is not None:
            # Who takes over holds on to what the policy holds.
            middle = (self._env.spec.action_low[dim] + self._env.spec.action_high[dim]) / 2
            self._is_closed = bool(moment.last_action[dim] > middle)
        return TAKE in self._tick(moment, acts=False).pressed

    def _tick(self, moment: Moment, *, acts: bool) -> Keys:
        keys = self._window.tick(moment.pictures(), self._lines(moment, acts))
        if keys.closed or LEAVE in keys.pressed:
            raise PersonLeft
        for tenths, digit in enumerate(DIGITS, start=1):
            if digit in keys.pressed:
                self._tenths = tenths
        return keys

    def _grips(self, keys: Keys) -> bool:
        """True = the gripper is to open or close now."""
        toggled = self._env.spec.gripper_dim is not None and GRIP in keys.pressed
        self._is_closed ^= toggled
        return toggled

    def _action(self, keys: Keys) -> np.ndarray:
        spec = self._env.spec
        action = np.array(self._env.rest_action(), dtype=np.float64)
        for dim, (down, up) in self._moves.items():
            action[dim] += self._half_range[dim] * self._tenths / 10 * ((up in keys.held) - (down in keys.held))
        if spec.gripper_dim is not None:
            action[spec.gripper_dim] = (spec.action_high if self._is_closed else spec.action_low)[spec.gripper_dim]
        return action

    def _lines(self, moment: Moment, acts: bool) -> list[str]:
        spec = self._env.spec
        who = f"YOU act; {TAKE} hands back" if acts else f"the policy acts; {TAKE} takes over"
        moves = "  ".join(f"{dim}: {down}/{up}" for dim, (down, up) in self._moves.items())
        grip = ""
        if spec.gripper_dim is not None:
            grip = f"   {GRIP}: gripper ({'closed' if self._is_closed else 'open'})"
        return [
            f"[{moment.frame}/{spec.max_steps}]   {who}",
            moment.prompt,
            f"action dims   {moves}{grip}",
            f"1-9, 0: step size ({self._tenths}/10)   {WAIT}: let a frame pass   {LEAVE}: save and end",
        ]


def moves_of(spec: EnvSpec) -> dict[int, tuple[str, str]]:
    """Action dim -> the keys that lower and raise it."""
    dims = [dim for dim in range(spec.action_dim) if dim != spec.gripper_dim]
    if len(dims) > len(MOVES):
        raise UsageError(f"--keyboard: moves up to {len(MOVES)} action dims, --env {spec.name} has {len(dims)}")
    pairs = dict(zip(dims, MOVES, strict=False))
    return {dim: pair[::-1] if dim in spec.downward_dims else pair for dim, pair in pairs.items()}
