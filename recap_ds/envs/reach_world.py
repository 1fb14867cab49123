"""The built-in reach task (``reach.py``) behind the common interface, with its expert."""

import numpy as np

from recap_ds.envs.interface import Environment, EnvSpec, StepResult, choose_views
from recap_ds.envs.reach import (
    ACTION_DIM,
    CAMERAS,
    FPS,
    MAX_STEPS,
    PROMPTS,
    STATE_DIM,
    expert_action,
    is_success,
    move,
    render,
    sample_scene,
)
from recap_ds.errors import UsageError


class ReachWorld(Environment):
    def __init__(
        self, name: str, tasks: str, views: dict[str, str] | None, size: int, max_steps: int | None = None
    ) -> None:
        chosen = tuple(tasks.split(",")) if tasks else tuple(PROMPTS)
        for task in chosen:
            if task not in PROMPTS:
                raise UsageError(f"--env {name}: has no task '{task}'; there are {', '.join(PROMPTS)}")
        self._views = choose_views(name, views, CAMERAS, default="top")
        self._size = size
        self.spec = EnvSpec(
            name=name,
            tasks={task: PROMPTS[task] for task in chosen},
            cameras=tuple(self._views),
            image_size=size,
            state_dim=STATE_DIM,
            action_low=np.full(ACTION_DIM, -1.0),
            action_high=np.full(ACTION_DIM, 1.0),
            fps=FPS,
            max_steps=max_steps or MAX_STEPS,
            has_expert=True,
        )

    def reset(self, seed: int, task: str) -> None:
        self._scene = sample_scene(np.random.default_rng(seed), task)
        self._position, self._velocity = self._scene.start, np.zeros(2)

    def step(self, action: np.ndarray) -> StepResult:
        self._position, self._velocity = move(self._position, np.asarray(action, dtype=np.float64))
        success = is_success(self._position, self._scene)
        return StepResult(0.0 if success else -1.0, success, terminated=success)

    def state(self) -> np.ndarray:
        return np.concatenate([self._position, self._velocity]).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {name: render(self._position, self._scene, camera, self._size) for name, camera in self._views.items()}

    def expert_action(self) -> np.ndarray:
        return expert_action(self._position, self._scene.target)

    def progress(self) -> float:
        return -float(np.linalg.norm(self._position - self._scene.target))
