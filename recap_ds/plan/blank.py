"""A batch of the right shapes and dtypes without data: what the loader would hand to a step, on the meta device."""

import torch
from torch import Tensor

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import NUM_AUGMENTATION_DRAWS, Observation, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.losses import LossNormalizers


def blank_batch(config: PiStarRECAPConfig, batch_size: int, num_cameras: int) -> TransitionBatch:
    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(batch_size, *shape, dtype=dtype, device="meta")

    model, horizon, action_dim = config.model, config.chunk_size, config.max_action_dim
    real, whole, flag = torch.float32, torch.int64, torch.bool

    def observation() -> Observation:
        return Observation(
            images=of(torch.uint8, num_cameras, 3, model.image_size, model.image_size),
            camera_mask=of(flag, num_cameras),
            tokens=of(whole, model.max_prompt_tokens),
            token_mask=of(flag, model.max_prompt_tokens),
            state=of(real, config.max_state_dim),
        )

    return TransitionBatch(
        observation=observation(),
        actions=of(real, horizon, action_dim),
        action_valid=of(flag, horizon),
        action_dim_mask=of(flag, action_dim),
        action_tokens=of(whole, config.num_action_tokens),
        action_token_mask=of(flag, config.num_action_tokens),
        next_observation=observation(),
        td_valid=of(flag),
        td_action_valid=of(flag, horizon),
        chunk_reward=of(real),
        chunk_discount=of(real),
        continues=of(real),
        mc_return=of(real),
        mc_valid=of(flag),
        label_indicator=of(whole),
        label_advantage=of(real),
        task=of(whole),
        source=of(whole),
        control=of(whole),
        outcome=of(whole),
        steps_to_end=of(whole),
        sample_valid=of(flag),
        replaced=of(flag),
        image_lender=of(whole),
        slot=of(whole),
        noise=of(real, model.flow_samples, horizon, action_dim),
        time=of(real, model.flow_samples),
        indicator_dropped=of(flag),
        augmentation=of(real, NUM_AUGMENTATION_DRAWS),
    )


def blank_scale() -> AdvantageScale:
    """Of a single task; how many there are changes nothing that is worth counting."""
    numbers = torch.empty(1, device="meta")
    return AdvantageScale(numbers, numbers, torch.empty(1, dtype=torch.bool, device="meta"))


def blank_normalizers() -> LossNormalizers:
    return LossNormalizers(*(torch.empty((), device="meta") for _ in LossNormalizers._fields))
