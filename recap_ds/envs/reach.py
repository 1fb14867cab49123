"""The built-in light task: drive a point to the target the prompt names. numpy only, thousands of frames a second.

Both targets are always in the scene, so a policy has to read the prompt; the state does not hold them, so it has to
look. World: the square [-1, 1]^2, x to the right, y up. An action is a velocity in [-1, 1]^2, one frame moves by STEP
times it. Near the named target the task is done (terminated); at the time limit it has failed (truncated, as gymnasium
says it). n = frames, P = picture side in pixels.
"""

from dataclasses import dataclass

import numpy as np

FPS = 10.0
STEP = 0.08
SUCCESS_RADIUS = 0.15
MAX_STEPS = 40
STATE_DIM = 4  # position, velocity
ACTION_DIM = 2
PROMPTS = {"reach_red": "move to the red target", "reach_blue": "move to the blue target"}
TASKS = tuple(PROMPTS)
CAMERAS = ("top", "wrist")

_BACKGROUND = (225, 225, 215)
_TARGET_COLORS = ((205, 35, 35), (35, 70, 205))  # in the order of TASKS
_POINT_COLOR = (25, 25, 25)
_TARGET_RADIUS, _POINT_RADIUS = 0.16, 0.09
# Half the side of what a camera shows, in world units; the wrist camera is centred on the point.
_TOP_REACH, _WRIST_REACH = 1.1, 0.45


@dataclass(frozen=True)
class Scene:
    """What an episode starts from."""

    task: str
    start: np.ndarray  # [2]
    targets: np.ndarray  # [2, 2], in the order of TASKS

    @property
    def target(self) -> np.ndarray:
        """The one the prompt names."""
        return self.targets[TASKS.index(self.task)]


def sample_scene(generator: np.random.Generator, task: str | None = None) -> Scene:
    """Start and targets well apart from each other; a random task unless one is given."""
    chosen = TASKS[generator.integers(len(TASKS))] if task is None else task
    while True:
        places = generator.uniform(-0.85, 0.85, size=(3, 2))
        gaps = np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1)
        if gaps.min() > 0.6:
            return Scene(chosen, start=places[0], targets=places[1:])


def move(position: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One frame: the new position and the velocity that led there."""
    velocity = np.clip(action, -1.0, 1.0)
    moved = np.clip(position + STEP * velocity, -1.0, 1.0)
    return moved, (moved - position) / STEP


def is_success(position: np.ndarray, scene: Scene) -> bool:
    return bool(np.linalg.norm(position - scene.target) < SUCCESS_RADIUS)


def render(position: np.ndarray, scene: Scene, camera: str, size: int) -> np.ndarray:
    """uint8 [P, P, 3]."""
    centre, reach = (np.zeros(2), _TOP_REACH) if camera == "top" else (position, _WRIST_REACH)
    pixels = (np.arange(size) + 0.5) / size * 2 - 1
    picture = np.empty((size, size, 3), dtype=np.uint8)
    picture[:] = _BACKGROUND
    discs = [(place, _TARGET_RADIUS, color) for place, color in zip(scene.targets, _TARGET_COLORS, strict=True)]
    for place, radius, color in [*discs, (position, _POINT_RADIUS, _POINT_COLOR)]:
        x, y = (place - centre) / reach
        # Rows run downwards, y upwards.
        inside = (pixels[None, :] - x) ** 2 + (pixels[:, None] + y) ** 2 < (radius / reach) ** 2
        picture[inside] = color
    return picture


def expert_action(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Straight to the target, at full speed until it is one step away."""
    direction = (target - position) / STEP
    return direction / max(1.0, float(np.linalg.norm(direction)))
