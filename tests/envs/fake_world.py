"""A class with gymnasium's calls and none of the package: a cart on a line that is to reach the end."""

from types import SimpleNamespace

import numpy as np


class Box:
    def __init__(self, low, high):
        self.low, self.high, self.shape, self.dtype = np.array(low), np.array(high), np.shape(low), np.dtype("float32")

    def __repr__(self):
        return f"Box({self.low}, {self.high})"


class Discrete:
    shape = ()

    def __repr__(self):
        return "Discrete(4)"


class Cart:
    """``length``: how far the end is; ``tells``: whether it knows its rate and time limit."""

    def __init__(self, length=3.0, tells=True, discrete=False, bound=2.0, endless=False, breaks=False, blind=False):
        self.length, self.breaks, self.blind = length, breaks, blind
        self.action_space = Discrete() if discrete else Box([-1.0], [np.inf if endless else bound])
        self.metadata = {"render_fps": 20} if tells else {}
        self.spec = SimpleNamespace(max_episode_steps=6) if tells else None
        self.num_renders = 0
        self.closed = False

    def reset(self, seed):
        self.place = float(np.random.default_rng(seed).uniform(0, 0.5))
        return self._see(), {}

    def step(self, action):
        assert action.dtype == np.float32
        if self.breaks:
            raise ZeroDivisionError("a simulator's own fault")
        self.place += float(action[0])
        done = self.place >= self.length
        return self._see(), self.place, done, self.place < -1, {"is_success": done, "other": 1}

    def render(self):
        # As gymnasium's own classes do without a render_mode.
        assert not self.blind
        self.num_renders += 1
        return np.full((20, 40, 3), 7, np.uint8)

    def close(self):
        self.closed = True

    def _see(self):
        picture = np.full((16, 16, 3), min(255, max(0, int(50 * self.place))), np.uint8)
        return {"agent": {"place": np.array([self.place, 1.0])}, "eye": picture, "name": "cart"}


NOT_A_CLASS = 3
