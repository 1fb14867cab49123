"""Action expert ``dit_cross``: a diffusion transformer that cross-attends to the prefix.

Flow time and advantage indicator modulate every block (adaLN-zero, Peebles & Xie 2023); the state is one token before
the chunk's actions; the prefix's keys and values are projected once per chunk and reused by every denoising step and
every flow draw.

    B batch   F flow draws sharing a prefix   H chunk   A action dims   S state dims   D expert width   T prefix tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.config import ModelConfig
from recap_ds.models.layers import FeedForward, ZeroLinear, attend, sincos_embedding, split_heads
from recap_ds.models.vlm import PrefixFeatures


class PrefixContext(NamedTuple):
    """What the expert keeps of a prefix: per layer, keys and values [B, N, T, D / N]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor  # [B, T]


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.query_key_value(x).chunk(3, dim=-1))
        return self.out(attend(query, key, value, mask))


class CrossAttention(nn.Module):
    """Queries of the chunk over keys and values that ``PrefixProjection`` made."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return self.out(attend(split_heads(self.query(x), self.num_heads), key, value, mask))


class PrefixProjection(nn.Module):
    def __init__(self, prefix_width: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(prefix_width)
        self.key_value = nn.Linear(prefix_width, 2 * width)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(self.norm(hidden)).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)


class DiTBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.modulation = ZeroLinear(width, 9 * width)  # shift, scale and gate for each of three branches
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_attention = CrossAttention(width, num_heads)
        self.feed_forward = FeedForward(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, condition: Tensor, x_mask: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """x [B * F, 1 + H, D], condition [B * F, D]; the prefix's tensors have batch B."""
        modulation = self.modulation(nn.functional.silu(condition))[:, None].chunk(9, dim=-1)

        def modulated(branch: int) -> Tensor:
            shift, scale, _ = modulation[3 * branch : 3 * branch + 3]
            return self.norms[branch](x) * (1 + scale) + shift

        x = x + modulation[2] * self.self_attention(modulated(0), x_mask)
        # Cross-attention treats queries one by one, so the draws of a sample line up behind its one prefix.
        queries = modulated(1).unflatten(0, (key.shape[0], -1)).flatten(1, 2)
        crossed = self.cross_attention(queries, key, value, mask)
        x = x + modulation[5] * crossed.reshape(x.shape)
        return x + modulation[8] * self.feed_forward(modulated(2))


class DiTCrossExpert(nn.Module):
    """velocity(prefix, state, x_t, t, indicator): d x_t / d t in openpi's convention (t = 1 is noise)."""

    def __init__(self, config: ModelConfig, prefix_width: int, state_dim: int, action_dim: int):
        super().__init__()
        width, num_heads = config.action_expert_hidden_size, config.action_expert_num_heads
        self.width = width
        self.activation_checkpointing = False
        self.state_in = nn.Linear(state_dim, width)
        self.action_in = nn.Linear(action_dim, width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.indicator_in = nn.Embedding(len(INDICATOR_IDS), width)
        num_layers = config.action_expert_num_layers
        self.projections = nn.ModuleList(PrefixProjection(prefix_width, width, num_heads) for _ in range(num_layers))
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_heads, config.action_expert_mlp_ratio, config.action_expert_dropout)
            for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = ZeroLinear(width, 2 * width)
        self.action_out = ZeroLinear(width, action_dim)

    def encode_prefix(self, prefix: PrefixFeatures) -> PrefixContext:
        keys, values = zip(*(projection(prefix.hidden) for projection in self.projections), strict=True)
        return PrefixContext(keys, values, prefix.mask)

    def forward(
        self, context: PrefixContext, state: Tensor, x_t: Tensor, time: Tensor, indicator: Tensor, valid: Tensor
    ) -> Tensor:
        """Velocity [B, F, H, A] float32.

        state [B, S]; x_t [B, F, H, A]; time, indicator [B, F]; valid [B, H], True = an action that exists: no
        token attends to the others, so what pads a chunk changes nothing.
        """
        batch_size, num_draws, chunk_size, _ = x_t.shape
        dtype = self.action_in.weight.dtype
        condition = self.time_in(sincos_embedding(time, self.width, 4e-3, 4.0).to(dtype)) + self.indicator_in(indicator)
        condition = condition.flatten(0, 1)
        state_token = self.state_in(state.to(dtype))[:, None, None].expand(-1, num_draws, -1, -1)
        x = torch.cat([state_token, self.action_in(x_t.to(dtype))], dim=2).flatten(0, 1)
        order = torch.arange(chunk_size + 1, device=x.device)
        x = x + sincos_embedding(order, self.width, 4.0, 10_000.0).to(dtype)
        x_mask = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1).repeat_interleave(num_draws, dim=0)

        for block, key, value in zip(self.blocks, context.keys, context.values, strict=True):
            arguments = (x, condition, x_mask, key, value, context.mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        shift, scale = self.final_modulation(nn.functional.silu(condition))[:, None].chunk(2, dim=-1)
        velocity = self.action_out(self.final_norm(x[:, 1:]) * (1 + scale) + shift)
        return velocity.unflatten(0, (batch_size, num_draws)).float()
