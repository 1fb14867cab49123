"""Exports for the reach task: random but awake, so that every observation gets another action and another value."""

from pathlib import Path

import numpy as np

from recap_ds.envs.reach import FPS, MAX_STEPS, PROMPTS
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Affine, Normalizer
from tests.tiny import tiny_config, wake

EVALUATION = {"rollout_batch_size": 4, "num_videos": 0, "num_envs": 1}


def save_policy(
    folder: Path,
    seed: int = 0,
    stage: str = "joint",
    cameras: tuple[str, ...] = ("top",),
    prompts: dict = PROMPTS,
    image_size: int | None = None,
    **overrides,
):
    """``folder``. Actions of some size, so that episodes differ: 0.7 of a full step is one standard deviation."""
    sections = {"evaluation": EVALUATION, "env": {"max_steps": 12}, **overrides}
    value = {"critic": "distributional"} if stage == "critic" else {}
    extra = {"recap": {"sft": True}} if stage == "policy" else {}
    config = tiny_config(model={"max_prompt_tokens": 40}, training={"stage": stage}, value=value, **extra, **sections)
    policy = PiStarRECAPPolicy(config)
    wake(policy, seed)
    state = Affine(np.zeros(4, np.float32), np.ones(4, np.float32), config.max_state_dim)
    actions = Affine(np.zeros(2, np.float32), np.full(2, 0.7, np.float32), config.max_action_dim)
    contract = RobotContract(
        cameras=cameras,
        image_size=image_size or config.model.image_size,
        state_dim=4,
        action_dim=2,
        fps=FPS,
        tasks={task: TaskContract(prompt=prompt, max_length=MAX_STEPS) for task, prompt in prompts.items()},
        normalizer=Normalizer("mean_std", state, actions).to_dict(),
        manifest_hash="0" * 64,
    )
    save_pretrained(policy, contract, folder)
    return folder
