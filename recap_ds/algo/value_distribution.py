"""A value as a distribution over bins (RECAP, arXiv 2511.14759, section IV-A): targets, loss and read-out.

Values are normalised returns in [-1, 0]; anything outside is clipped to it. Bins are points, evenly spaced with one on
each end: with the paper's 201 they are 0.005 apart. A distribution over them is trained by cross-entropy and read as
its mean or a quantile. All results are float32, whatever the logits come in.

Knows nothing of networks, or of where a return comes from.

    B samples   num_bins points on [-1, 0]
"""

import math

import torch
from torch import Tensor


def value_bins(num_bins: int, device: torch.device | str = "cpu") -> Tensor:
    """The values the bins stand for, ascending from -1 to 0. [num_bins] float32."""
    assert num_bins >= 2, "a value between -1 and 0 needs a bin at both ends"
    return torch.linspace(-1.0, 0.0, num_bins, device=device)


def two_hot(values: Tensor, num_bins: int) -> Tensor:
    """``values`` [B] -> [B, num_bins]: all mass on the two bins around a value, so that the mean is that value."""
    position = _position(values, num_bins)
    lower = position.floor().clamp(max=num_bins - 2)
    share = (position - lower)[:, None].float()
    target = torch.zeros(len(values), num_bins, device=values.device)
    index = lower.long()[:, None]
    return target.scatter(1, index, 1.0 - share).scatter(1, index + 1, share)


def hl_gauss(values: Tensor, num_bins: int, sigma_bins: float = 0.75) -> Tensor:
    """``values`` [B] -> [B, num_bins]: a Gaussian around the value, integrated over each bin's cell.

    ``sigma_bins`` is its deviation in bins (arXiv 2403.03950: 0.75). What falls beyond the outermost cells is spread
    over the rest, so that within a few bins of either end the mean leans inwards by up to half a bin.
    """
    edges = torch.arange(num_bins + 1, dtype=torch.float64, device=values.device) - 0.5  # cells centred on the bins
    standard = (edges - _position(values, num_bins)[:, None]) / (sigma_bins * math.sqrt(2.0))
    mass = torch.erf(standard).diff(dim=1)
    return (mass / mass.sum(dim=1, keepdim=True)).float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_b target_b log softmax(logits)_b, without a mean. [B, num_bins] twice -> [B]."""
    return -(target * logits.float().log_softmax(dim=1)).sum(dim=1)


def expected_value(logits: Tensor) -> Tensor:
    """Mean of the distribution. [B, num_bins] -> [B]."""
    return logits.float().softmax(dim=1) @ value_bins(logits.shape[1], logits.device)


def quantile(logits: Tensor, level: float) -> Tensor:
    """The lowest bin at or below which at least ``level`` of the probability lies. [B, num_bins] -> [B]."""
    assert 0.0 < level < 1.0, "a quantile lies strictly between the ends"
    cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
    # The sum may end a rounding error below 1, but never below a level that is.
    index = (cumulative < level).sum(dim=1).clamp(max=logits.shape[1] - 1)
    return value_bins(logits.shape[1], logits.device)[index]


def _position(values: Tensor, num_bins: int) -> Tensor:
    """Where a value lies, in bins from the lowest. Float64: in float32 a share would be off in its fifth digit."""
    return (values.double().clamp(-1.0, 0.0) + 1.0) * (num_bins - 1)
