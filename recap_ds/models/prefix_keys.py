"""Gemma's layers over the prefix, handing out every layer's keys and values: what a joint expert attends to.

transformers would hand them out through a cache, which activation checkpointing switches off; here they are outputs of
the layer's pass like its hidden states, so they survive recomputation and carry gradient. Only the layers' own modules
are called, each once: ZeRO-3 gathers them and adapters act in them as in transformers' own forward.

    B batch   T prefix tokens   D VLM width   K key-value heads   d head dim
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recap_ds.models.layers import attend_grouped, rotary_angles, rotate


def encode_with_keys(
    language_model: nn.Module, embeddings: Tensor, visible: Tensor, position_ids: Tensor, checkpointing: bool
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Hidden states [B, T, D] after the last norm; per layer, rotated keys and values [B, K, T, d].

    ``embeddings`` [B, T, D]; ``visible`` [B, 1, 1 or T, T], True = may be attended to; ``position_ids`` [B, T].
    """
    rotary = language_model.rotary_emb
    angles = rotary_angles(position_ids, rotary.head_dim, rotary.theta)
    x, keys, values = embeddings, [], []
    for layer in language_model.layers:
        arguments = (layer, x, angles, visible)
        if checkpointing and torch.is_grad_enabled():
            x, key, value = checkpoint(_run_layer, *arguments, use_reentrant=False)
        else:
            x, key, value = _run_layer(*arguments)
        keys.append(key)
        values.append(value)
    hidden = language_model.norm(x)
    if torch.is_grad_enabled():
        keys[-1] = _TakePart.apply(keys[-1], hidden)
    return hidden, tuple(keys), tuple(values)


def _run_layer(layer: nn.Module, x: Tensor, angles: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key = rotate(key, angles)
    x = x + attention.o_proj(attend_grouped(rotate(query, angles), key, value, visible))
    return x + layer.mlp(layer.post_attention_layernorm(x)), key, value


class _TakePart(torch.autograd.Function):
    """``key`` unchanged, with ``hidden`` in its history at gradient zero.

    Actions do not depend on what follows the last layer's keys and values, but ZeRO-3 wants every trainable parameter
    in every step: it would step one that is left out by a stale gradient.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, hidden: Tensor) -> Tensor:
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype)
