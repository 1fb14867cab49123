"""A served policy small enough for tests, requests for it, and their right answers."""

from pathlib import Path
from typing import Any

import numpy as np

from recap_ds.models.export_format import ExportRecord
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.models.robot import RobotPolicy
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Affine, Normalizer
from tests.tiny import tiny_config, wake

# What rounding may do to actions of some size 4 when a request is computed in another company.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
API_KEY = "a-key-of-some-length"
PROMPTS = ("push", "push the red cube to the left")


def save_made(folder: Path) -> Path:
    """An export of two cameras, 3 state dims and 2 action dims, in units far from the model's own."""
    config = tiny_config(model={"max_prompt_tokens": 40})
    policy = PiStarRECAPPolicy(config)
    wake(policy)
    center, scale = np.array([1.0, -2.0, 3.0], np.float32), np.array([2.0, 4.0, 0.5], np.float32)
    normalizer = Normalizer(
        "mean_std",
        state=Affine(center, scale, config.max_state_dim),
        actions=Affine(center[:2], scale[:2], config.max_action_dim),
    )
    contract = RobotContract(
        cameras=("front", "wrist"),
        image_size=config.model.image_size,
        state_dim=3,
        action_dim=2,
        fps=10.0,
        tasks={"push": TaskContract(prompt=PROMPTS[0], max_length=30)},
        normalizer=normalizer.to_dict(),
        manifest_hash="0" * 64,
    )
    save_pretrained(policy, contract, folder)
    return folder


def request(number: int, **changes: Any) -> dict[str, Any]:
    """Another observation for every number, with indicator, guidance and prompt that differ from request to request."""
    generator = np.random.default_rng(number)
    images = {f"observation/{name}": generator.integers(0, 256, (24, 32, 3), np.uint8) for name in ("front", "wrist")}
    options = [
        {},
        {"advantage": None},
        {"advantage": "negative", "guidance_beta": 2.5},
        {"advantage": "positive", "guidance_beta": 0.5},
    ]
    return {
        **images,
        "observation/state": generator.standard_normal(3).astype(np.float32),
        "prompt": PROMPTS[number % 2],
        "seed": number,
        **options[number % len(options)],
        **changes,
    }


def right_answer(robot: RobotPolicy, asked: dict[str, Any]) -> np.ndarray:
    """[H, A] of a request that is alone with the model."""
    options = {key: asked[key] for key in ("advantage", "guidance_beta", "seed") if key in asked}
    return robot.predict_chunk({key: value for key, value in asked.items() if key not in options}, **options)


def load_made(export: Path) -> tuple[RobotPolicy, ExportRecord]:
    return RobotPolicy.from_pretrained(export), ExportRecord.load(export)
