"""PushT (gym-pusht): push a T-shaped block onto its outline. The state is where the pusher is; the block is seen.

An action is the place the pusher is to go to, in pixels of a 512 x 512 arena. There is no scripted expert.
"""

import numpy as np

from recap_ds.envs.interface import Environment, EnvSpec, StepResult, choose_views
from recap_ds.envs.packages import import_simulator

TASK, PROMPT = "pusht", "push the T-shaped block onto the T-shaped target"
CAMERAS = ("top",)
MAX_STEPS, FPS = 300, 10.0
STATE_DIM, ACTION_DIM = 2, 2
ARENA = 512.0


class PushT(Environment):
    def __init__(self, views: dict[str, str] | None, size: int, max_steps: int | None = None) -> None:
        self._views = choose_views(TASK, views, CAMERAS, default="top")
        package = import_simulator("gym_pusht.envs", TASK, "pip install 'recap_ds[pusht]'")
        # States only, so that a step renders nothing; pictures are drawn as its own "pixels" observation is.
        self._world = package.PushTEnv(obs_type="state", observation_width=size, observation_height=size)
        self.spec = EnvSpec(
            name=TASK,
            tasks={TASK: PROMPT},
            cameras=tuple(self._views),
            image_size=size,
            state_dim=STATE_DIM,
            action_low=np.zeros(ACTION_DIM),
            action_high=np.full(ACTION_DIM, ARENA),
            fps=FPS,
            max_steps=max_steps or MAX_STEPS,
            has_expert=False,
            downward_dims=(1,),
        )

    def reset(self, seed: int, task: str) -> None:
        self._full_state, _ = self._world.reset(seed=seed)
        self._coverage = 0.0

    def step(self, action: np.ndarray) -> StepResult:
        self._full_state, reward, terminated, _, info = self._world.step(np.asarray(action, dtype=np.float64))
        self._coverage = float(info["coverage"])
        return StepResult(float(reward), bool(info["is_success"]), terminated=bool(terminated))

    def state(self) -> np.ndarray:
        return self._full_state[:STATE_DIM].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        picture = np.ascontiguousarray(self._world._render(visualize=False))
        return dict.fromkeys(self._views, picture)

    def close(self) -> None:
        self._world.close()

    def rest_action(self) -> np.ndarray:
        """The place where the pusher is."""
        return self._full_state[:STATE_DIM]

    def progress(self) -> float:
        """Share of the outline that the block covers."""
        return self._coverage
