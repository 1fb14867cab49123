"""Parts shared by the action expert and the critics.

Every module uses the parameters it owns inside its own ``forward``: ZeRO-3 gathers them there and nowhere else.
B batch, Q queries, T context tokens, D width, N heads, d head dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def sincos_embedding(position: Tensor, dim: int, min_period: float, max_period: float) -> Tensor:
    """[sin, cos] features of a scalar [...] -> [..., dim], float32; periods log-spaced (openpi's time embedding).

    Computed where it is used: a table kept as a buffer would be rounded to bfloat16 by zero.Init. In float64 until the
    end, as openpi has it: the fastest angle passes a thousand radians, where float32 is off by 1e-4.
    """
    fraction = torch.linspace(0.0, 1.0, dim // 2, device=position.device, dtype=torch.float64)
    period = min_period * (max_period / min_period) ** fraction
    angle = position.double()[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, N, T, D / N]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """[B, N, Q, D/N] over [B, N, T, D/N] -> [B, Q, D]. ``key_mask`` [B, T], True = may be attended to.

    A row whose every key is masked returns zeros, not NaN.
    """
    mask = None
    if key_mask is not None:
        # A fully masked row would be NaN in softmax; let it see everything and zero it afterwards.
        alive = key_mask.any(dim=-1, keepdim=True)
        mask = (key_mask | ~alive)[:, None, None, :]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = out.transpose(1, 2).flatten(2)
    return out if key_mask is None else out * alive[..., None]


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[B, N, Q, d] over fewer key-value heads [B, K, T, d] -> [B, Q, N * d].

    The N / K heads that share a key line up as queries of it: any kernel of PyTorch then serves, and no key is copied.
    ``mask`` is one for all queries, [B, 1, 1, T], or from ``line_up``; every row has to see something.
    """
    num_groups = query.shape[1] // key.shape[1]
    out = query.unflatten(1, (key.shape[1], num_groups)).flatten(2, 3)
    out = functional.scaled_dot_product_attention(out, key, value, attn_mask=mask)
    return out.unflatten(2, (num_groups, -1)).flatten(1, 2).transpose(1, 2).flatten(2)


def line_up(mask: Tensor, num_groups: int) -> Tensor:
    """[B, Q, T], True = attends -> [B, 1, N / K * Q, T] for ``attend_grouped``: once for all layers."""
    return mask.repeat(1, num_groups, 1)[:, None]


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """[B, T] -> [B, T, head_dim / 2], float32; computed where they are used (see ``sincos_embedding``)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    return positions[..., None].float() * theta**-exponent


def rotation(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles [B, T, d / 2] -> their cosines and sines [2, B, 1, T, d / 2] for ``rotate``: once for all layers."""
    return torch.stack([angles.cos(), angles.sin()])[:, :, None].to(dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of [B, N, T, d] by a ``rotation``: Gemma pairs a dim with the one half a head away."""
    cos, sin = turn.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(functional.gelu(self.up(x), approximate="tanh")))


class LearnedQueries(nn.Module):
    """A few trainable query vectors, handed out by ``forward`` so that ZeRO-3 gathers them."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_queries, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def forward(self, batch_size: int) -> Tensor:
        return self.weight.expand(batch_size, -1, -1)


class AttentionPool(nn.Module):
    """[B, T, context_width] -> [B, width]: one learned query attends over the context."""

    def __init__(self, context_width: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(context_width)
        self.queries = LearnedQueries(1, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, context: Tensor, mask: Tensor) -> Tensor:
        context = self.norm(context)
        query = split_heads(self.queries(context.shape[0]), self.num_heads)
        key, value = split_heads(self.key(context), self.num_heads), split_heads(self.value(context), self.num_heads)
        return self.out(attend(query, key, value, mask)).squeeze(1)


class ZeroLinear(nn.Linear):
    """Linear that starts at zero. The leaf does it itself: a parent could not under zero.Init."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroEmbedding(nn.Embedding):
    """Embedding that starts at zero, for the reason ``ZeroLinear`` has."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
