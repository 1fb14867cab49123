"""Action expert ``pi_joint``: the Gemma expert of pi0 (arXiv 2410.24164) and pi0.5 (arXiv 2504.16054).

Layer by layer its queries attend to the prefix's keys and values and to its own tokens in one softmax, so that
published weights fit. The prefix never attends to the expert: it was encoded before, and here only its keys and values
arrive. Shared by both versions: rotary positions that go on where the real prefix tokens end. pi05: flow time modulates
every norm (adaRMS) and the state is no token. pi0: flow time is mixed into the action tokens, the state is one token
before them, which does not see them. The advantage comes as a vector, added to the time's features and zero at first,
so that published weights act as they did; or in words, which the VLM has encoded beside the prefix: a draw attends to
those of its own indicator, and its positions go on after them. Module names are those of the published tensors.

    B batch   F flow draws sharing a prefix   H chunk   A action dims   S suffix tokens (H, of pi0 1 + H)
    D expert width   N heads   K key-value heads   P prefix tokens   E words of all advantages   d head dim
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.models.advantage_words import read_by
from recap_ds.models.layers import (
    ZeroEmbedding,
    ZeroLinear,
    attend_grouped,
    line_up,
    rotary_angles,
    rotate,
    rotation,
    sincos_embedding,
)
from recap_ds.models.vlm import PrefixFeatures

RMS_EPSILON = 1e-6
INDICATOR_NAME = "indicator_in.weight"  # the one parameter that nobody has published


class PiDimensions(NamedTuple):
    """Heads, layers and rotary base are the VLM's: both attend in one softmax."""

    version: str  # pi05 | pi0
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float


class PiContext(NamedTuple):
    """What the expert keeps of a prefix: per layer, rotated keys and values [B, K, P + E, d]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor  # [B, P] bool, True = may be attended to
    readers: Tensor | None  # [E] int64, whose draws attend to which word; None: the advantage is no words


def _rms(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)


class RMSNorm(nn.Module):
    """Gemma's: the stored weight is one less than the factor. Gate 1."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        del condition  # pi0 has none
        return (_rms(x) * (1.0 + self.weight.float())).to(x.dtype), x.new_ones(())


class AdaRMSNorm(nn.Module):
    """Scale, shift and the branch's gate from the condition; zero at first, so every layer begins as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = ZeroLinear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, F, S, D], condition [B, F, D] -> like x, and the gate [B, F, 1, D]."""
        scale, shift, gate = self.dense(condition)[:, :, None].chunk(3, dim=-1)
        return (_rms(x) * (1.0 + scale.float()) + shift.float()).to(x.dtype), gate


class PiAttention(nn.Module):
    def __init__(self, dims: PiDimensions):
        super().__init__()
        self.head_dim = dims.head_dim
        self.q_proj = nn.Linear(dims.width, dims.num_heads * dims.head_dim, bias=False)
        self.k_proj = nn.Linear(dims.width, dims.num_kv_heads * dims.head_dim, bias=False)
        self.v_proj = nn.Linear(dims.width, dims.num_kv_heads * dims.head_dim, bias=False)
        self.o_proj = nn.Linear(dims.num_heads * dims.head_dim, dims.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """x [B, F, S, D]; turn [2, B, 1, F * S, d / 2]; key, value [B, K, P + E, d]; mask [B, 1, .., P + E + F * S].

        The draws of a sample line up in one row of queries, so that its prefix is not copied for each.
        """
        tokens = x.flatten(1, 2)
        query, own_key, own_value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        key = torch.cat([key, rotate(own_key, turn)], dim=2)
        value = torch.cat([value, own_value], dim=2)
        out = attend_grouped(rotate(query, turn), key, value, mask)
        return self.o_proj(out).unflatten(1, x.shape[1:3])


class PiMLP(nn.Module):
    def __init__(self, dims: PiDimensions):
        super().__init__()
        self.gate_proj = nn.Linear(dims.width, dims.mlp_width, bias=False)
        self.up_proj = nn.Linear(dims.width, dims.mlp_width, bias=False)
        self.down_proj = nn.Linear(dims.mlp_width, dims.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class PiLayer(nn.Module):
    def __init__(self, dims: PiDimensions):
        super().__init__()
        norm = AdaRMSNorm if dims.version == "pi05" else RMSNorm
        self.input_layernorm = norm(dims.width)
        self.self_attn = PiAttention(dims)
        self.post_attention_layernorm = norm(dims.width)
        self.mlp = PiMLP(dims)

    def forward(
        self, x: Tensor, condition: Tensor | None, turn: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        normed, gate = self.input_layernorm(x, condition)
        x = x + gate * self.self_attn(normed, turn, key, value, mask)
        normed, gate = self.post_attention_layernorm(x, condition)
        return x + gate * self.mlp(normed)


class PiJointExpert(nn.Module):
    """velocity(prefix, state, x_t, t, indicator): d x_t / d t in openpi's convention (t = 1 is noise)."""

    def __init__(self, dims: PiDimensions, state_dim: int, action_dim: int, told_in_words: bool = False):
        super().__init__()
        width = dims.width
        self.dims, self.told_in_words = dims, told_in_words
        self.activation_checkpointing = False
        self.action_in_proj = nn.Linear(action_dim, width)
        if dims.version == "pi05":
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(state_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        if not told_in_words:
            self.indicator_in = ZeroEmbedding(len(INDICATOR_IDS), width)
        self.layers = nn.ModuleList(PiLayer(dims) for _ in range(dims.num_layers))
        self.norm = AdaRMSNorm(width) if dims.version == "pi05" else RMSNorm(width)
        self.action_out_proj = nn.Linear(width, action_dim)

    def encode_prefix(self, prefix: PrefixFeatures) -> PiContext:
        """Nothing is computed: the VLM has made keys and values already, once for all draws, steps and branches."""
        assert len(prefix.keys) == self.dims.num_layers, "the prefix was encoded without keys and values"
        assert self.told_in_words == (prefix.readers is not None), "expert and VLM disagree on how advantages are told"
        return PiContext(prefix.keys, prefix.values, prefix.mask, prefix.readers)

    def forward(
        self, context: PiContext, state: Tensor, x_t: Tensor, time: Tensor, indicator: Tensor, valid: Tensor
    ) -> Tensor:
        """Velocity [B, F, H, A] float32.

        state [B, S]; x_t [B, F, H, A]; time, indicator [B, F]; valid [B, H], True = an action that exists: no
        other token attends to the rest, so what pads a chunk changes nothing.
        """
        num_draws, chunk_size = x_t.shape[1:3]
        x, condition = self._suffix(state, x_t, time, indicator)
        read = None if context.readers is None else read_by(context.readers, indicator)
        mask = line_up(self._mask(context, read, valid, num_draws), self.dims.num_heads // self.dims.num_kv_heads)
        turn = rotation(self._angles(context, read, num_draws, x.shape[2]), x.dtype)
        for layer, key, value in zip(self.layers, context.keys, context.values, strict=True):
            arguments = (x, condition, turn, key, value, mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        x, _ = self.norm(x[:, :, -chunk_size:], condition)
        return self.action_out_proj(x).float()

    def _suffix(self, state: Tensor, x_t: Tensor, time: Tensor, indicator: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, F, S, D] and what modulates the norms [B, F, D], of pi0 None."""
        dtype = self.action_in_proj.weight.dtype
        tokens = self.action_in_proj(x_t.to(dtype))
        features = sincos_embedding(time, self.dims.width, 4e-3, 4.0).to(dtype)
        told = 0.0 if self.told_in_words else self.indicator_in(indicator)
        if self.dims.version == "pi05":
            condition = functional.silu(self.time_mlp_out(functional.silu(self.time_mlp_in(features))))
            return tokens, condition + told
        features = (features + told)[:, :, None].expand_as(tokens)
        tokens = self.action_time_mlp_in(torch.cat([tokens, features], dim=-1))
        tokens = self.action_time_mlp_out(functional.silu(tokens))
        state_token = self.state_proj(state.to(dtype))[:, None, None].expand(-1, x_t.shape[1], -1, -1)
        return torch.cat([state_token, tokens], dim=2), None

    def _mask(self, context: PiContext, read: Tensor | None, valid: Tensor, num_draws: int) -> Tensor:
        """[B, F * S, P + E + F * S] bool, True = attends.

        Every token to the prefix, to the words that its draw reads (``read`` [B, F, E]) and to the draw's actions.
        """
        if self.dims.version == "pi0":
            valid = functional.pad(valid, (1, 0), value=True)
        length = valid.shape[1]
        within = valid[:, None, :].expand(-1, length, -1)
        if self.dims.version == "pi0":
            to_state = torch.arange(length, device=valid.device) == 0
            within = within & (to_state[None, :] | ~to_state[:, None])
        # What pads a chunk sees itself, so that no row is without any key.
        within = within | torch.eye(length, dtype=torch.bool, device=valid.device)
        same_draw = torch.eye(num_draws, dtype=torch.bool, device=valid.device)
        own = same_draw[None, :, None, :, None] & within[:, None, :, None, :]
        own = own.flatten(3, 4).flatten(1, 2)
        words = [] if read is None else [read.repeat_interleave(length, dim=1)]
        return torch.cat([context.mask[:, None].expand(-1, own.shape[1], -1), *words, own], dim=2)

    def _angles(self, context: PiContext, read: Tensor | None, num_draws: int, length: int) -> Tensor:
        """Rotary angles [B, F * S, d / 2]: positions go on after the prefix's real tokens and the words read."""
        order = torch.arange(length, device=context.mask.device)
        positions = context.mask.sum(dim=1)[:, None, None] + order.expand(num_draws, -1)
        if read is not None:
            positions = positions + read.sum(dim=2)[:, :, None]
        return rotary_angles(positions.flatten(1), self.dims.head_dim, self.dims.rope_theta)
