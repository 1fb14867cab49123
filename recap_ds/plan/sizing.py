"""A recipe's policy as sizes: its parameters, and what a step of it holds at a batch size.

Measurements are kept: a table asks for the same ones over and over.
"""

from typing import NamedTuple

import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.footprint import ParameterSize
from recap_ds.distributed.linear import linear_is, sharded_linear
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.plan.measure import StepMeasure, build_on_meta, measure_evaluation_on_meta, measure_on_meta


class PartSize(NamedTuple):
    name: str  # a child of the policy
    trainable: int
    frozen: int


class Sizer:
    def __init__(self, config: PiStarRECAPConfig, dtype: torch.dtype, vlm_folder: str | None, num_cameras: int):
        self._config, self._dtype, self._vlm_folder = config, dtype, vlm_folder
        self._num_cameras = num_cameras
        self._measures: dict[tuple[int, bool, bool], StepMeasure] = {}
        self._evaluations: dict[int, int] = {}
        policy = self._build(config)
        self.parameters = _parameter_sizes(policy)
        self.vlm_is_random = policy.vlm.random_init or config.vlm_source.random_init
        self.parts = [
            PartSize(
                name, *(sum(p.numel() for p in child.parameters() if p.requires_grad is kind) for kind in (True, False))
            )
            for name, child in policy.named_children()
        ]

    def measure(self, batch_size: int, checkpointing: bool, sharded: bool) -> StepMeasure:
        """``sharded``: as under ZeRO stage 3."""
        key = (batch_size, checkpointing, sharded)
        if key not in self._measures:
            training = {"batch_size": batch_size, "activation_checkpointing": checkpointing}
            policy = self._build(with_training(self._config, **training))
            self._measures[key] = measure_on_meta(
                policy, self._num_cameras, linear_is(sharded_linear) if sharded else None
            )
        return self._measures[key]

    def measure_evaluation(self, batch_size: int) -> int:
        """Bytes alive at once in the held-out evaluation of a batch."""
        if batch_size not in self._evaluations:
            policy = self._build(self._config)
            self._evaluations[batch_size] = measure_evaluation_on_meta(policy, batch_size, self._num_cameras)
        return self._evaluations[batch_size]

    def _build(self, config: PiStarRECAPConfig) -> PiStarRECAPPolicy:
        return build_on_meta(config, self._dtype, self._vlm_folder)


def with_training(config: PiStarRECAPConfig, **values: object) -> PiStarRECAPConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=values)})


def _parameter_sizes(policy: PiStarRECAPPolicy) -> list[ParameterSize]:
    groups = {id(p): group["name"] for group in policy.parameter_groups() for p in group["params"]}
    return [ParameterSize(name, p.numel(), groups.get(id(p))) for name, p in policy.named_parameters()]
