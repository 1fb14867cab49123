"""The one batch contract: what the loader makes, what every model and loss reads.

NamedTuples, never dataclasses: ZeRO-3's backward hooks walk only tuples, lists and dicts, and a module that takes or
returns a dataclass crashes in backward. Shapes are fixed for a run; what a sample lacks is zero-filled and masked, so
that the composition of a batch never changes the graph.

    B samples   C camera slots   H chunk_size   A max_action_dim   S max_state_dim   L max_prompt_tokens
    F flow draws per sample (model.flow_samples)   P image side in pixels
    M model.max_action_tokens, 0 where no loss reads them
"""

from typing import NamedTuple

import torch
from torch import Tensor

SOURCE_IDS = {"demo": 0, "auto": 1, "intervention": 2}
OUTCOME_IDS = {"success": 0, "failure": 1, "truncated": 2, "unknown": 3}
CONTROL_IDS = {"policy": 0, "human": 1}

# Uniform draws per sample for augmentation: shift y, shift x, brightness, contrast, saturation.
NUM_AUGMENTATION_DRAWS = 5


class Observation(NamedTuple):
    """What a policy sees at one moment."""

    images: Tensor  # [B, C, 3, P, P] uint8, RGB; normalised and augmented on the device
    camera_mask: Tensor  # [B, C] bool, True = the camera is there
    tokens: Tensor  # [B, L] int64
    token_mask: Tensor  # [B, L] bool, True = a real token
    state: Tensor  # [B, S] float32, normalised; padding is 0


class TransitionBatch(NamedTuple):
    observation: Observation
    # Action chunk, normalised; frames past num_valid and dims past the robot's are 0.
    actions: Tensor  # [B, H, A] float32
    action_valid: Tensor  # [B, H] bool, True = before the episode ends or control changes hands
    action_dim_mask: Tensor  # [B, A] bool, True = a dim the robot has
    # The same chunk in tokens (``processing/action_tokens.py``), real ones first.
    action_tokens: Tensor  # [B, M] int64, in [0, model.action_vocabulary)
    action_token_mask: Tensor  # [B, M] bool, True = a real token
    # TD window of k = td_steps frames. next_observation is o_{t+k}; zeros where continues is 0. A stage without TD
    # gets no images of it, [B, 0, 3, P, P].
    next_observation: Observation
    td_valid: Tensor  # [B] bool, False = no TD target exists (k = 0)
    td_action_valid: Tensor  # [B, H] bool, True = inside the window: what Q is shown
    chunk_reward: Tensor  # [B] float32, sum_{i<k} g^i r_{t+i}, divided by the task's normaliser
    chunk_discount: Tensor  # [B] float32, g^k
    continues: Tensor  # [B] float32, 0 only where the task ended inside the window
    # Monte-Carlo return of the whole episode from this frame, clipped; mc_valid False where it is not known.
    mc_return: Tensor  # [B] float32
    mc_valid: Tensor  # [B] bool
    # From label files, in stage policy; zeros where the run reads none.
    label_indicator: Tensor  # [B] int64, INDICATOR_IDS
    label_advantage: Tensor  # [B] float32
    # What the sample is.
    task: Tensor  # [B] int64, index into the manifest's tasks
    source: Tensor  # [B] int64, SOURCE_IDS
    control: Tensor  # [B] int64, CONTROL_IDS of the frame
    outcome: Tensor  # [B] int64, OUTCOME_IDS of the whole episode
    steps_to_end: Tensor  # [B] int64, frames after this one in the episode
    sample_valid: Tensor  # [B] bool, False = padding of an evaluation batch
    replaced: Tensor  # [B] bool, True = stands in for a damaged sample
    # In held-out evaluation, the row whose images are shown instead of this one's; zeros elsewhere.
    image_lender: Tensor  # [B] int64
    # Everything random about the sample: Philox draws of (seed, slot, purpose), so losses do not depend on the layout.
    slot: Tensor  # [B] int64
    noise: Tensor  # [B, F, H, A] float32, standard normal
    time: Tensor  # [B, F] float32 in (0, 1], 1 = noise
    indicator_dropped: Tensor  # [B] bool
    augmentation: Tensor  # [B, NUM_AUGMENTATION_DRAWS] float32 in [0, 1)


def map_tensors(function, nest):
    """Apply ``function`` to every tensor of nested NamedTuples, keeping their types."""
    if isinstance(nest, Tensor):
        return function(nest)
    return type(nest)(*(map_tensors(function, part) for part in nest))


def to_device(batch: TransitionBatch, device: torch.device) -> TransitionBatch:
    """Copy without waiting: the source should be pinned for the copy to overlap compute."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
