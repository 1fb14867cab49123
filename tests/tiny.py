"""A config and a batch small enough for every test: the tiny VLM at 32 px, an expert and critics of width 32.

The batch has what real ones have: chunks that end early, an action dim and a state dim the robot lacks, missing
cameras, prompts of several lengths, ended tasks (their next observation is zeros) and a sample without a TD target.
"""

from typing import Any

import torch
from torch import nn

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import (
    CONTROL_IDS,
    NUM_AUGMENTATION_DRAWS,
    OUTCOME_IDS,
    SOURCE_IDS,
    Observation,
    TransitionBatch,
)
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.layers import ZeroLinear

TINY: dict[str, Any] = {
    "chunk_size": 4,
    "max_action_dim": 6,
    "max_state_dim": 5,
    "num_inference_steps": 3,
    "model": {
        "vlm_model_name": "tiny",
        "image_size": 32,
        "max_prompt_tokens": 6,
        "action_expert_hidden_size": 32,
        "action_expert_num_layers": 2,
        "action_expert_num_heads": 2,
        "qv_hidden_size": 32,
        "qv_num_layers": 2,
        "qv_num_heads": 2,
        "flow_samples": 2,
    },
    "training": {"batch_size": 8, "num_training_steps": 20, "num_warmup_steps": 2, "use_amp": False},
}
NUM_BYTE_TOKENS = 259  # what the byte tokenizer can produce


def tiny_config(**overrides: Any) -> PiStarRECAPConfig:
    """``TINY`` with ``overrides``; a section's dict replaces only the keys it names."""
    values = dict(TINY)
    for key, value in overrides.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return PiStarRECAPConfig(**values)


def random_observation(
    config: PiStarRECAPConfig, batch_size: int, generator: torch.Generator, num_cameras: int = 2
) -> Observation:
    side, num_tokens = config.model.image_size, config.model.max_prompt_tokens
    images = torch.randint(0, 256, (batch_size, num_cameras, 3, side, side), generator=generator, dtype=torch.uint8)
    camera_mask = torch.rand(batch_size, num_cameras, generator=generator) < 0.7
    camera_mask[:, 0] = True
    length = torch.randint(1, num_tokens + 1, (batch_size, 1), generator=generator)
    token_mask = torch.arange(num_tokens) < length
    tokens = torch.randint(3, NUM_BYTE_TOKENS, (batch_size, num_tokens), generator=generator)
    state = torch.randn(batch_size, config.max_state_dim, generator=generator)
    state[:, -1] = 0.0
    return Observation(
        images * camera_mask[:, :, None, None, None], camera_mask, tokens * token_mask, token_mask, state
    )


def random_batch(
    config: PiStarRECAPConfig, batch_size: int, seed: int, num_cameras: int = 2, num_tasks: int = 2
) -> TransitionBatch:
    """Rows 0, 1, 2, 3, ... are demo, auto, intervention, demo, ...

    The task ends inside the window of rows 1, 5, ...; the last row has no TD target (k = 0).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch_size,), generator=generator)

    horizon, num_draws = config.chunk_size, config.model.flow_samples
    shape = horizon, config.max_action_dim
    row = torch.arange(batch_size)
    num_valid = integers(1, horizon + 1)
    td_steps = torch.where(row == batch_size - 1, 0, num_valid)
    action_valid = torch.arange(horizon) < num_valid[:, None]
    action_dim_mask = (torch.arange(shape[1]) < shape[1] - 1).expand(batch_size, -1).contiguous()
    continues = (row % 4 != 1) | (row == batch_size - 1)
    # Of their own generator, so that all else is the same with and without them.
    words = torch.Generator().manual_seed(seed + 1)
    action_token_mask = torch.arange(config.num_action_tokens) < 2 * num_valid[:, None]
    action_tokens = torch.randint(config.model.action_vocabulary, action_token_mask.shape, generator=words)
    later = random_observation(config, batch_size, generator, num_cameras)
    source = row % len(SOURCE_IDS)
    return TransitionBatch(
        observation=random_observation(config, batch_size, generator, num_cameras),
        actions=torch.randn(batch_size, *shape, generator=generator)
        * action_valid[:, :, None]
        * action_dim_mask[:, None, :],
        action_valid=action_valid,
        action_dim_mask=action_dim_mask,
        action_tokens=action_tokens,
        action_token_mask=action_token_mask,
        next_observation=Observation(*(part * _like(continues, part) for part in later)),
        td_valid=td_steps > 0,
        td_action_valid=torch.arange(horizon) < td_steps[:, None],
        chunk_reward=-0.05 * uniform(batch_size),
        chunk_discount=config.frame_discount ** td_steps.float(),
        continues=continues.float(),
        mc_return=-uniform(batch_size),
        mc_valid=uniform(batch_size) < 0.9,
        label_indicator=row % len(INDICATOR_IDS),
        label_advantage=0.1 * torch.sin(row.float()),
        task=row % num_tasks,
        source=source,
        control=torch.where(source == SOURCE_IDS["auto"], CONTROL_IDS["policy"], CONTROL_IDS["human"]),
        outcome=integers(0, len(OUTCOME_IDS)),
        steps_to_end=num_valid - 1,
        sample_valid=torch.ones(batch_size, dtype=torch.bool),
        replaced=torch.zeros(batch_size, dtype=torch.bool),
        image_lender=row.roll(1),
        slot=row.clone(),
        noise=torch.randn(batch_size, num_draws, *shape, generator=generator),
        time=uniform(batch_size, num_draws) * 0.999 + 0.001,
        indicator_dropped=uniform(batch_size) < 0.3,
        augmentation=uniform(batch_size, NUM_AUGMENTATION_DRAWS),
    )


def _like(keep: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``keep`` [B] shaped to multiply ``part`` [B, ...] without changing its dtype."""
    return keep.view(-1, *[1] * (part.dim() - 1)).to(part.dtype)


def wake(module: nn.Module, seed: int = 0) -> None:
    """Random weights for every layer that starts at zero, LoRA's included: until then most inputs reach no output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        zero_layers = (m for name, m in module.named_modules() if isinstance(m, ZeroLinear) or "lora_B." in name)
        for layer in zero_layers:
            for parameter in layer.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
