"""Normalisation of states and actions: one affine map per dim, from the manifest's statistics, stored in every export.

mean_std gives mean 0 and std 1; quantile maps [q01, q99] to [-1, 1]. A dim that hardly moves (spread below MIN_SPREAD)
is centred only: dividing by its spread would blow sensor noise up to the size of real motion. The model sees vectors
padded with zeros to a fixed width, so that robots can share it; ``unnormalize`` cuts the padding off again.

    D dims of the robot   W width the model works at
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from recap_ds.config import PiStarRECAPConfig

MIN_SPREAD = 1e-3  # of the std, or of q99 - q01, in the data's own units
QUANTILE_EPSILON = 1e-6


class Statistics(Protocol):
    """Of one feature, per dim, in the data's own units; the manifest's FeatureStats is one."""

    num_dims: int
    mean: Sequence[float]
    std: Sequence[float]
    q01: Sequence[float]
    q99: Sequence[float]


Array = TypeVar("Array", np.ndarray, torch.Tensor)


class Affine(NamedTuple):
    """normalised = (value - center) / scale."""

    center: np.ndarray  # [D] float32
    scale: np.ndarray  # [D] float32, positive
    width: int  # W >= D

    @classmethod
    def of(cls, stats: Statistics, method: Literal["mean_std", "quantile"], width: int) -> "Affine":
        assert width >= stats.num_dims, (width, stats.num_dims)
        if method == "mean_std":
            center, scale = np.array(stats.mean), np.array(stats.std)
            moves = scale >= MIN_SPREAD
        else:
            low, high = np.array(stats.q01), np.array(stats.q99)
            scale = (high - low + QUANTILE_EPSILON) / 2
            center = low + scale
            moves = high - low >= MIN_SPREAD
        return cls(center.astype(np.float32), np.where(moves, scale, 1.0).astype(np.float32), width)

    def normalize(self, values: Array) -> Array:
        """[..., D] in the data's units -> [..., W]."""
        center, scale = self._like(values)
        return _pad((values - center) / scale, self.width)

    def unnormalize(self, values: Array) -> Array:
        """[..., W] -> [..., D] in the data's units."""
        center, scale = self._like(values)
        return values[..., : len(self.center)] * scale + center

    def _like(self, values: Array) -> tuple[Array, Array]:
        if isinstance(values, torch.Tensor):
            return torch.from_numpy(self.center).to(values), torch.from_numpy(self.scale).to(values)
        return self.center, self.scale


class Normalizer(NamedTuple):
    method: Literal["mean_std", "quantile"]
    state: Affine
    actions: Affine

    @classmethod
    def of(cls, state: Statistics, actions: Statistics, config: PiStarRECAPConfig) -> "Normalizer":
        """From statistics over all sources together: every source must mean the same thing by the same number."""
        method = config.data.normalization
        return cls(
            method,
            state=Affine.of(state, method, config.max_state_dim),
            actions=Affine.of(actions, method, config.max_action_dim),
        )

    def to_dict(self) -> dict:
        """Plain JSON; every float32 survives the round trip bit for bit."""
        affines = {
            name: {"center": part.center.tolist(), "scale": part.scale.tolist(), "width": part.width}
            for name, part in (("state", self.state), ("actions", self.actions))
        }
        return {"method": self.method, **affines}

    @classmethod
    def from_dict(cls, values: dict) -> "Normalizer":
        def affine(part: dict) -> Affine:
            return Affine(np.array(part["center"], np.float32), np.array(part["scale"], np.float32), part["width"])

        return cls(values["method"], affine(values["state"]), affine(values["actions"]))


def _pad(values: Array, width: int) -> Array:
    if isinstance(values, torch.Tensor):
        return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    padded = np.zeros((*values.shape[:-1], width), values.dtype)  # np.pad takes ten times as long
    padded[..., : values.shape[-1]] = values
    return padded
