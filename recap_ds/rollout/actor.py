"""The model's side of a rollout: requests in padded batches of one size, noise keyed by (seed, episode, frame).

A plain replica of an export, no engine. On one kind of device, what a row gets depends on its own request and its place
in the batch alone.

    B batch   H chunk   K executed actions   A action dims
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.batch import Observation, map_tensors
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.draws import Purpose, generator
from recap_ds.errors import UsageError
from recap_ds.models.inference_value import predict_values
from recap_ds.models.observation import ObservationEncoder
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import Pretrained, acting_dtype, load_pretrained
from recap_ds.models.sampling import AdvantageName
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.rollout.requests import Decision, Request


class Arm(NamedTuple):
    """A way to act that is compared with others on the same episodes."""

    indicator: AdvantageName
    guidance_beta: float

    @property
    def name(self) -> str:
        return "none" if self.indicator is None else f"{self.indicator}_beta{self.guidance_beta:g}"


class Judge:
    """A critic and what it reads."""

    def __init__(self, critic: Pretrained) -> None:
        self._policy = critic.policy
        self._encoder = ObservationEncoder(critic.policy.config, critic.contract, critic.tokenizer)
        self.contract: RobotContract = critic.contract

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._policy.to(device, dtype)
        self._device = device

    def values(self, requests: Sequence[Request], batch_size: int) -> list[float]:
        observation = _padded(self._encoder, requests, batch_size, self._device)
        predicted = predict_values(self._policy, observation).value.float().cpu()
        return [float(predicted[request.row]) for request in requests]


class Actor:
    """``judge``: the critic that is asked for values, where there is one."""

    def __init__(
        self,
        pretrained: Pretrained,
        arms: Sequence[Arm],
        *,
        seed: int,
        batch_size: int,
        executed_frames: int | None,
        judge: Judge | None = None,
    ) -> None:
        self._policy, self._arms, self._seed, self._batch_size = pretrained.policy, arms, seed, batch_size
        self._encoder = ObservationEncoder(pretrained.policy.config, pretrained.contract, pretrained.tokenizer)
        self._normalizer = Normalizer.from_dict(pretrained.contract.normalizer)
        self._action_dim = pretrained.contract.action_dim
        self._executed_frames = executed_frames or pretrained.policy.config.chunk_size
        self._judge = judge

    def to(self, device: torch.device) -> None:
        dtype = acting_dtype(self._policy.config, device)
        if device.type == "cpu":
            # A sum split over threads rounds by their number, which falls as ranks are added.
            torch.set_num_threads(1)
        self._device = device
        self._policy.to(device, dtype).eval()
        if self._judge is not None:
            self._judge.to(device, dtype)

    def to_host(self) -> None:
        """Make room on the device for the next one."""
        self._policy.to("cpu")
        if self._judge is not None:
            self._judge.to(torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def decide(self, requests: Sequence[Request]) -> list[Decision]:
        """One forward per arm that has requests."""
        assert len({request.row for request in requests}) == len(requests), "two requests in one row"
        values: dict[int, float] = {}
        if self._judge is not None and (asked := [request for request in requests if request.wants_value]):
            values = dict(
                zip([request.row for request in asked], self._judge.values(asked, self._batch_size), strict=True)
            )
        chunks: dict[int, np.ndarray] = {}
        for arm in sorted({request.arm for request in requests}):
            of_arm = [request for request in requests if request.arm == arm]
            chunks |= zip([request.row for request in of_arm], self._chunks(of_arm, self._arms[arm]), strict=True)
        return [Decision(chunks[request.row], values.get(request.row)) for request in requests]

    def _chunks(self, requests: Sequence[Request], arm: Arm) -> list[np.ndarray]:
        """[K, A] for each request, in the robot's units."""
        config = self._policy.config
        dims = torch.arange(config.max_action_dim, device=self._device) < self._action_dim
        chunk = self._policy.predict_action_chunk(
            _padded(self._encoder, requests, self._batch_size, self._device),
            noise=self._noise(requests),
            action_dim_mask=dims.expand(self._batch_size, -1),
            advantage=arm.indicator,
            guidance_beta=arm.guidance_beta,
        )
        rows = chunk.float().cpu().numpy()[:, : self._executed_frames]
        return [self._normalizer.actions.unnormalize(rows[request.row]) for request in requests]

    def _noise(self, requests: Sequence[Request]) -> Tensor:
        """[B, H, A], the same for every arm: what differs between arms is what they were told, not their luck."""
        config = self._policy.config
        noise = np.zeros((self._batch_size, config.chunk_size, config.max_action_dim), np.float32)
        for request in requests:
            draws = generator(self._seed, Purpose.ROLLOUT_NOISE, request.number, request.frame)
            noise[request.row] = draws.standard_normal(noise.shape[1:], dtype=np.float32)
        return torch.from_numpy(noise).to(self._device)


def _padded(
    encoder: ObservationEncoder, requests: Sequence[Request], batch_size: int, device: torch.device
) -> Observation:
    """Every request in its own row; the other rows hold the first one."""
    source = torch.zeros(batch_size, dtype=torch.int64)
    for number, request in enumerate(requests):
        source[request.row] = number
    encoded = encoder.encode([request.observation for request in requests])
    return map_tensors(lambda tensor: tensor[source].to(device), encoded)


def choose_arms(config: PiStarRECAPConfig) -> list[Arm]:
    """Every indicator with every guidance; without an indicator guidance does nothing, so that stands there once."""
    if config.recap.policy_extraction == "weighted":
        return [Arm(None, 1.0)]  # such a policy was trained without indicators
    arms: list[Arm] = []
    for indicator in config.evaluation.indicators:
        betas = config.evaluation.guidance_betas if indicator != "none" else (1.0,)
        arms += [Arm(None if indicator == "none" else indicator, beta) for beta in betas]
    return list(dict.fromkeys(arms))


def check_acts(pretrained: Pretrained, export: Path, flag: str) -> None:
    """UsageError where the export cannot act in a world."""
    if pretrained.policy.config.training.stage == "critic":
        raise UsageError(f"{flag} {export}: holds a critic, which judges and does not act; give a policy's export")
    if pretrained.contract is None:
        raise UsageError(f"{flag} {export}: was saved without a contract, so the robot's units are not known")


def load_judge(export: Path | None, own: Pretrained) -> Judge | None:
    """The critic of ``export`` (--critic); without one the policy's own, if it was exported with it."""
    if export is None:
        return Judge(own) if _has_critic(own.policy) else None
    critic = load_pretrained(export)
    if critic.contract is None or not _has_critic(critic.policy):
        raise UsageError(
            f"--critic {export}: holds no critic; give an export of stage critic or joint, with its critics"
        )
    if missing := sorted(set(critic.contract.cameras) - set(own.contract.cameras)):
        raise UsageError(f"--critic {export}: looks through '{missing[0]}', a camera that the policy does not have")
    if critic.contract.state_dim != own.contract.state_dim:
        raise UsageError(
            f"--critic {export}: reads {critic.contract.state_dim} state dims, the policy {own.contract.state_dim}"
        )
    return Judge(critic)


def _has_critic(policy: PiStarRECAPPolicy) -> bool:
    """True = all that ``predict_values`` asks for."""
    wanted = {"critic"} if policy.config.value.critic == "distributional" else {"critic", "target_critic"}
    return wanted <= dict(policy.named_children()).keys()
