"""A policy at PaliGemma's and the expert's true widths, with few layers and random weights, and a request for it.

The table of words is cut: it is a look-up, and would be two gigabytes.
"""

import tempfile
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.layers import ZeroEmbedding, ZeroLinear
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.published import published_config
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Affine, Normalizer

Expert = Literal["dit_cross", "pi_joint"]
VLM_NAME, IMAGE_SIZE = "google/paligemma-3b-pt-224", 224
VOCABULARY = 512
STATE_DIM = ACTION_DIM = 14
PROMPT = "put the red cup on the tray"


class Sizes(NamedTuple):
    """What is built; the defaults of ``recap-ds bench sample`` are the real widths."""

    expert: Expert
    num_layers: int  # of vision tower, language model and expert
    shrink: int  # divides widths and heads
    num_cameras: int
    chunk_size: int
    num_steps: int


def build_policy(sizes: Sizes) -> PiStarRECAPPolicy:
    """With random weights, on the CPU."""
    with tempfile.TemporaryDirectory(prefix="recap_ds_bench_") as folder:
        vlm_config(sizes).save_pretrained(folder)
        heads = vlm_config(sizes).text_config.num_attention_heads  # which pi_joint has to share
        config = PiStarRECAPConfig(
            chunk_size=sizes.chunk_size,
            max_action_dim=ACTION_DIM,
            max_state_dim=STATE_DIM,
            num_inference_steps=sizes.num_steps,
            model={
                "vlm_model_name": folder,
                "vlm_random_init": True,
                "image_size": IMAGE_SIZE,
                "action_expert": sizes.expert,
                "action_expert_hidden_size": 1024 // sizes.shrink,
                "action_expert_num_layers": sizes.num_layers,
                "action_expert_num_heads": heads,
            },
            training={"stage": "policy", "use_amp": True},
            recap={"sft": True},
        )
        policy = PiStarRECAPPolicy(config).eval()
    # What starts at zero would hide what it multiplies: every way to sample would give the noise back.
    for module in policy.action_expert.modules():
        if isinstance(module, ZeroLinear | ZeroEmbedding):
            nn.init.normal_(module.weight, std=0.02)
    return policy


def vlm_config(sizes: Sizes) -> Any:
    """PaliGemma-3B's, with few layers; shrunk, with fewer heads as wide as its own."""
    config = published_config(VLM_NAME)
    text, vision = config.text_config, config.vision_config
    if sizes.shrink not in (1, 2, 4, 8):
        raise UsageError(f"--shrink {sizes.shrink}: give 1, 2, 4 or 8, which divide the heads")
    for part in (text, vision):
        part.hidden_size //= sizes.shrink
        part.intermediate_size //= sizes.shrink
        part.num_attention_heads //= sizes.shrink
        part.num_hidden_layers = sizes.num_layers
    config.projection_dim = vision.projection_dim = text.hidden_size
    text.vocab_size, config.image_token_index = VOCABULARY, VOCABULARY - 1
    return config


def made_contract(sizes: Sizes, config: PiStarRECAPConfig) -> RobotContract:
    zeros, ones = np.zeros(STATE_DIM, np.float32), np.ones(STATE_DIM, np.float32)
    affine = Affine(zeros, ones, config.max_state_dim)
    return RobotContract(
        cameras=tuple(f"camera_{number}" for number in range(sizes.num_cameras)),
        image_size=IMAGE_SIZE,
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        fps=50.0,
        tasks={"made": TaskContract(prompt=PROMPT, max_length=500)},
        normalizer=Normalizer("mean_std", affine, affine).to_dict(),
        manifest_hash="0" * 64,
    )


def made_request(contract: RobotContract) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    images = {f"observation/{name}": chance.integers(0, 256, shape, np.uint8) for name in contract.cameras}
    return {**images, "observation/state": np.zeros(STATE_DIM, np.float32), "prompt": PROMPT, "seed": 0}
