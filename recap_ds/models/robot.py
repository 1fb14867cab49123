"""A trained policy with a robot's own units on both sides: images, state and prompt in, actions out.

An observation is a dict: ``observation/<camera>`` uint8 [height, width, 3] for every camera of the contract,
``observation/state`` [S] and ``prompt`` - the keys a policy server is sent.

    H chunk   S, A state and action dims of the robot
"""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from recap_ds.models.sampling import AdvantageLevel, AdvantageName
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.images import resize_with_padding
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import Tokenizer, encode_prompts


class RobotPolicy:
    """One robot's loop: ``act`` once per control step at ``contract.fps``, ``reset`` between episodes."""

    def __init__(
        self, policy: PiStarRECAPPolicy, contract: RobotContract, tokenizer: Tokenizer, device: str | torch.device
    ):
        self.contract = contract
        self._policy = policy.to(device).eval()
        self._tokenizer = tokenizer
        self._normalizer = Normalizer.from_dict(contract.normalizer)
        self._device = torch.device(device)
        self._action_dims = torch.arange(policy.config.max_action_dim, device=device)[None] < contract.action_dim
        self._queue: deque[np.ndarray] = deque()

    @classmethod
    def from_pretrained(cls, export: str | Path, device: str | torch.device = "cpu") -> "RobotPolicy":
        """From an export folder or the hub id of one."""
        policy, contract, tokenizer = load_pretrained(export)
        if policy.config.training.stage == "critic":
            raise UsageError(f"{export}: holds a critic, which judges and does not act; give a policy's export")
        if contract is None:
            raise UsageError(f"{export}: was saved without a contract, so the robot's units are not known")
        return cls(policy, contract, tokenizer, device)

    def predict_chunk(
        self,
        observation: Mapping[str, Any],
        *,
        advantage: AdvantageName = "positive",
        guidance_beta: float = 1.0,
        seed: int | None = None,
    ) -> np.ndarray:
        """Actions [H, A] float32 in the robot's units. ``seed`` makes the sampling repeatable."""
        if advantage not in get_args(AdvantageLevel) and advantage is not None:
            raise UsageError(f"advantage: {advantage!r} is not 'positive', 'negative' or None")
        if not math.isfinite(guidance_beta):
            raise UsageError(f"guidance_beta: {guidance_beta} is not a finite number")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        shape = (1, self._policy.config.chunk_size, self._policy.config.max_action_dim)
        chunk = self._policy.predict_action_chunk(
            self._encode(observation),
            # Drawn on the host: the same seed gives the same actions on every device.
            noise=torch.randn(shape, generator=generator).to(self._device),
            action_dim_mask=self._action_dims,
            advantage=advantage,
            guidance_beta=guidance_beta,
        )
        return self._normalizer.actions.unnormalize(chunk[0].float().cpu().numpy())

    def act(self, observation: Mapping[str, Any], **options: Any) -> np.ndarray:
        """Next action [A] of the current chunk; a new one is predicted, with ``options``, when it is used up."""
        if not self._queue:
            self._queue.extend(self.predict_chunk(observation, **options))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue.clear()

    def _encode(self, observation: Mapping[str, Any]) -> Observation:
        config, contract = self._policy.config, self.contract
        wanted = {*(f"observation/{name}" for name in contract.cameras), "observation/state", "prompt"}
        if missing := sorted(wanted - observation.keys()):
            raise UsageError(f"observation: '{missing[0]}' is missing; the policy was trained with {sorted(wanted)}")
        if not isinstance(observation["prompt"], str):
            raise UsageError(f"prompt: expected text, got {observation['prompt']!r}")
        try:
            state = np.asarray(observation["observation/state"], np.float32)
        except (TypeError, ValueError):
            raise UsageError(f"observation/state: expected {contract.state_dim} numbers") from None
        if state.shape != (contract.state_dim,) or not np.isfinite(state).all():
            raise UsageError(
                f"observation/state: expected {contract.state_dim} finite numbers, got shape {state.shape}"
            )
        images = [self._image(observation, name) for name in contract.cameras]
        tokens, mask = encode_prompts(self._tokenizer, [observation["prompt"]], config.model.max_prompt_tokens)
        encoded = Observation(
            images=torch.from_numpy(np.stack(images)[None]),
            camera_mask=torch.ones(1, len(images), dtype=torch.bool),
            tokens=torch.from_numpy(tokens),
            token_mask=torch.from_numpy(mask),
            state=torch.from_numpy(self._normalizer.state.normalize(state)[None]),
        )
        return Observation(*(tensor.to(self._device) for tensor in encoded))

    def _image(self, observation: Mapping[str, Any], camera: str) -> np.ndarray:
        """[3, P, P] uint8."""
        image = np.asarray(observation[f"observation/{camera}"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UsageError(
                f"observation/{camera}: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
            )
        return resize_with_padding(image, self._policy.config.model.image_size).transpose(2, 0, 1)
