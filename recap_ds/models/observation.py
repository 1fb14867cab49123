"""A robot's observations, as its drivers give them, checked and encoded into the model's units.

An observation is a dict: ``observation/<camera>`` uint8 [height, width, 3] for every camera of the contract,
``observation/state`` [S] and ``prompt`` - the keys a policy server is sent.

    B observations   C cameras   P image side   S state dims of the robot
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recap_ds.batch import Observation
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.images import resize_with_padding
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.prompts import PromptEncoder
from recap_ds.processing.tokens import Tokenizer


class ObservationEncoder:
    """For one policy or critic and the robot it was trained on."""

    def __init__(self, config: PiStarRECAPConfig, contract: RobotContract, tokenizer: Tokenizer) -> None:
        self._config, self._contract = config, contract
        self._normalizer = Normalizer.from_dict(contract.normalizer)
        self._prompts = PromptEncoder(config, tokenizer, contract.state_dim)

    def encode(self, observations: Sequence[Mapping[str, Any]]) -> Observation:
        """[B, ...] on the CPU. UsageError where an observation is not what the contract says."""
        for observation in observations:
            self._check_keys(observation)
        slots = self._contract.slots
        images = [[self._image(each, camera) for camera in slots] for each in observations]
        filled = torch.tensor([camera is not None for camera in slots])
        states = np.stack([self._state(each) for each in observations])
        prompts = [each["prompt"] for each in observations]
        tokens, mask = self._prompts.encode(prompts, states)
        return Observation(
            images=torch.from_numpy(np.array(images)),
            camera_mask=filled.repeat(len(observations), 1),
            tokens=torch.from_numpy(tokens),
            token_mask=torch.from_numpy(mask),
            state=torch.from_numpy(states),
        )

    def _check_keys(self, observation: Mapping[str, Any]) -> None:
        wanted = {*(f"observation/{name}" for name in self._contract.cameras), "observation/state", "prompt"}
        if missing := sorted(wanted - observation.keys()):
            raise UsageError(f"observation: '{missing[0]}' is missing; the policy was trained with {sorted(wanted)}")
        if not isinstance(observation["prompt"], str):
            raise UsageError(f"prompt: expected text, got {type(observation['prompt']).__name__}")
        if not observation["prompt"].strip():
            raise UsageError("prompt: is empty; give the words of the task")

    def _state(self, observation: Mapping[str, Any]) -> np.ndarray:
        """[S], normalised."""
        expected = self._contract.state_dim
        with np.errstate(over="ignore"):  # what overflows is refused below
            try:
                state = np.asarray(observation["observation/state"], np.float32)
            except (TypeError, ValueError):
                raise UsageError(f"observation/state: expected {expected} numbers") from None
            if state.shape != (expected,) or not np.isfinite(state).all():
                raise UsageError(f"observation/state: expected {expected} finite numbers, got shape {state.shape}")
            normalized = self._normalizer.state.normalize(state)
        if not np.isfinite(normalized).all():
            raise UsageError(f"observation/state: up to {np.abs(state).max():.3g}, which is beyond any unit it was in")
        return normalized

    def _image(self, observation: Mapping[str, Any], camera: str | None) -> np.ndarray:
        """[3, P, P] uint8."""
        side = self._config.model.image_size
        if camera is None:
            return np.zeros((3, side, side), np.uint8)
        image = np.asarray(observation[f"observation/{camera}"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UsageError(
                f"observation/{camera}: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
            )
        return resize_with_padding(image, side).transpose(2, 0, 1)
