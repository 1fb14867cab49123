"""A trained policy with a robot's own units on both sides: images, state and prompt in, actions out.

What an observation is stands in ``observation.py``.

    H chunk   A action dims of the robot
"""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from recap_ds.batch import map_tensors
from recap_ds.errors import UsageError
from recap_ds.models.observation import ObservationEncoder
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from recap_ds.models.sampling import AdvantageLevel, AdvantageName
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import Tokenizer


class RobotPolicy:
    """One robot's loop: ``act`` once per control step at ``contract.fps``, ``reset`` between episodes."""

    def __init__(
        self, policy: PiStarRECAPPolicy, contract: RobotContract, tokenizer: Tokenizer, device: str | torch.device
    ):
        self.contract = contract
        self._policy = policy.to(device).eval()
        self._encoder = ObservationEncoder(policy.config, contract, tokenizer)
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
        encoded = map_tensors(lambda tensor: tensor.to(self._device), self._encoder.encode([observation]))
        chunk = self._policy.predict_action_chunk(
            encoded,
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
