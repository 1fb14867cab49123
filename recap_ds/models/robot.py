"""A trained policy with a robot's own units on both sides: images, state and prompt in, actions out.

What an observation is stands in ``observation.py``.

    B requests   H chunk   A action dims of the robot
"""

from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.observation import ObservationEncoder
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import acting_dtype, load_pretrained
from recap_ds.models.sampling import AdvantageLevel, AdvantageName
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import Tokenizer

# Useful ones are near 1 to 3; what a slip of a client asks for must not become a motion.
MAX_GUIDANCE_BETA = 100


class ChunkRequest(NamedTuple):
    """A request for a chunk of actions that was checked: nothing in it can fail any more."""

    observation: Observation  # [1, ...] on the CPU
    advantage: AdvantageName
    guidance_beta: float
    seed: int | None


class RobotPolicy:
    """One robot's loop: ``act`` once per control step at ``contract.fps``, ``reset`` between episodes.

    Computes in the precision of training on an accelerator, in float32 on a CPU.
    """

    def __init__(
        self, policy: PiStarRECAPPolicy, contract: RobotContract, tokenizer: Tokenizer, device: str | torch.device
    ):
        self.contract = contract
        self._device = torch.device(device)
        self.dtype = acting_dtype(policy.config, self._device)
        self._policy = policy.to(self._device, self.dtype).eval()
        self._encoder = ObservationEncoder(policy.config, contract, tokenizer)
        self._normalizer = Normalizer.from_dict(contract.normalizer)
        self._action_dims = torch.arange(policy.config.max_action_dim, device=device)[None] < contract.action_dim
        self._queue: deque[np.ndarray] = deque()

    @classmethod
    def from_pretrained(
        cls, export: str | Path, device: str | torch.device = "cpu", revision: str | None = None
    ) -> "RobotPolicy":
        """From an export folder or the hub id of one."""
        policy, contract, tokenizer = load_pretrained(export, revision=revision)
        if policy.config.training.stage == "critic":
            raise UsageError(f"{export}: holds a critic, which judges and does not act; give a policy's export")
        if contract is None:
            raise UsageError(f"{export}: was saved without a contract, so the robot's units are not known")
        return cls(policy, contract, tokenizer, device)

    @property
    def chunk_size(self) -> int:
        return self._policy.config.chunk_size

    def request(
        self,
        observation: Mapping[str, Any],
        *,
        advantage: AdvantageName = "positive",
        guidance_beta: float = 1.0,
        seed: int | None = None,
    ) -> ChunkRequest:
        """Check and encode what ``predict_chunks`` is asked. UsageError where it does not fit the contract."""
        if advantage not in get_args(AdvantageLevel) and advantage is not None:
            raise UsageError(f"advantage: {str(advantage)[:60]!r} is not 'positive', 'negative' or None")
        if not isinstance(guidance_beta, Real) or not abs(guidance_beta) <= MAX_GUIDANCE_BETA:
            said = str(guidance_beta)[:60]
            raise UsageError(f"guidance_beta: {said} is not a number from -{MAX_GUIDANCE_BETA} to {MAX_GUIDANCE_BETA}")
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise UsageError(f"seed: {str(seed)[:60]} is not a whole number from 0 to 2**63 - 1")
        return ChunkRequest(self._encoder.encode([observation]), advantage, float(guidance_beta), seed)

    def predict_chunks(self, requests: Sequence[ChunkRequest]) -> list[np.ndarray]:
        """Actions [H, A] float32 in the robot's units for each request, by one forward.

        Prompts are padded to one length, so any requests fit together, each with its own advantage, guidance and seed.
        A request gets the same actions in any company, but for rounding: sums of another batch size are ordered
        differently. Alone it gets those of ``predict_chunk`` bit for bit.
        """
        parts = zip(*(request.observation for request in requests), strict=True)
        chunks = self._policy.predict_action_chunk(
            Observation(*(torch.cat(part).to(self._device) for part in parts)),
            noise=torch.cat([self._noise(request.seed) for request in requests]).to(self._device),
            action_dim_mask=self._action_dims.expand(len(requests), -1),
            advantage=[request.advantage for request in requests],
            guidance_beta=[request.guidance_beta for request in requests],
        )
        return list(self._normalizer.actions.unnormalize(chunks.float().cpu().numpy()))

    def _noise(self, seed: int | None) -> Tensor:
        """[1, H, ...], drawn on the host: the same seed gives the same noise on every device."""
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        config = self._policy.config
        return torch.randn((1, config.chunk_size, config.max_action_dim), generator=generator)

    def predict_chunk(
        self,
        observation: Mapping[str, Any],
        *,
        advantage: AdvantageName = "positive",
        guidance_beta: float = 1.0,
        seed: int | None = None,
    ) -> np.ndarray:
        """Actions [H, A] float32 in the robot's units. ``seed`` makes the sampling repeatable."""
        request = self.request(observation, advantage=advantage, guidance_beta=guidance_beta, seed=seed)
        return self.predict_chunks([request])[0]

    def act(self, observation: Mapping[str, Any], **options: Any) -> np.ndarray:
        """Next action [A] of the current chunk; a new one is predicted, with ``options``, when it is used up."""
        if not self._queue:
            self._queue.extend(self.predict_chunk(observation, **options))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue.clear()
