"""The smallest world: a point on a line that is to reach +1. Counts what it is asked, and can crash on purpose."""

import numpy as np

from recap_ds.envs.interface import Environment, EnvSpec, StepResult


class LineWorld(Environment):
    """Seed s starts at -s / 10. Task "stuck" does not move under actions below 0.5;
    "wall" ends at frame 4. Its picture shows the frame."""

    def __init__(self, max_steps: int = 12) -> None:
        self.spec = EnvSpec(
            name="line",
            tasks={"go": "go right", "stuck": "pull hard", "fall": "do not fall", "wall": "go"},
            cameras=("eye",),
            image_size=4,
            state_dim=1,
            action_low=np.array([-1.0]),
            action_high=np.array([1.0]),
            fps=5.0,
            max_steps=max_steps,
            has_expert=True,
        )
        self.num_renders = 0

    def reset(self, seed: int, task: str) -> None:
        self.place, self.task, self.frame = -seed / 10, task, 0

    def step(self, action: np.ndarray) -> StepResult:
        assert action.dtype == np.float32
        self.frame += 1
        if self.task != "stuck" or action[0] >= 0.5:
            self.place += 0.2 * float(action[0])
        success = self.place >= 0.999
        fallen = self.task == "fall" and self.place < -0.5
        return StepResult(
            self.place,
            success,
            terminated=success or fallen,
            truncated=self.task == "wall" and self.frame == 4,
        )

    def state(self) -> np.ndarray:
        return np.array([self.place], np.float32)

    def images(self) -> dict[str, np.ndarray]:
        self.num_renders += 1
        return {"eye": np.full((4, 4, 3), self.frame, np.uint8)}

    def expert_action(self) -> np.ndarray:
        return np.array([0.8])

    def progress(self) -> float:
        return self.place
