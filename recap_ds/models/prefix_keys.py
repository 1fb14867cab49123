"""Gemma's layers over the prefix, handing out every layer's keys and values: what a joint expert attends to.

Words for the expert alone may ride along: they attend to the prefix and to those of their own block, and no prefix
token to them. They share the modules' calls with it, so that ZeRO-3 gathers nothing for them, and not its attention,
which stays as it is without them.

transformers would hand them out through a cache, which activation checkpointing switches off; here they are outputs of
the layer's pass like its hidden states, so they survive recomputation and carry gradient. Only the layers' own modules
are called, each once: ZeRO-3 gathers them and adapters act in them as in transformers' own forward.

    B batch   T prefix tokens   E words for the expert   D VLM width   K key-value heads   d head dim
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recap_ds.models.layers import attend_grouped, line_up, rotary_angles, rotate, rotation


class Sequences(NamedTuple):
    """What enters the first layer: the prefix, and behind it the words for the expert, if there are any."""

    embeddings: Tensor  # [B, T + E, D]
    position_ids: Tensor  # [B, T + E]
    visible: Tensor  # [B, 1, 1, T] bool, True = may be attended to
    visible_to_words: Tensor | None  # [B, E, T + E] bool, True = attends; None without words


def encode_with_keys(
    language_model: nn.Module, sequences: Sequences, checkpointing: bool
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The prefix's hidden states [B, T, D] after the last norm; per layer, rotated keys and values [B, K, T + E, d]."""
    rotary, text_config = language_model.rotary_emb, language_model.config
    angles = rotary_angles(sequences.position_ids, rotary.head_dim, rotary.theta)
    turn, to_words = rotation(angles, sequences.embeddings.dtype), sequences.visible_to_words
    if to_words is not None:
        to_words = line_up(to_words, text_config.num_attention_heads // text_config.num_key_value_heads)
    x, keys, values = sequences.embeddings, [], []
    for layer in language_model.layers:
        arguments = (layer, x, turn, sequences.visible, to_words)
        if checkpointing and torch.is_grad_enabled():
            x, key, value = checkpoint(_run_layer, *arguments, use_reentrant=False)
        else:
            x, key, value = _run_layer(*arguments)
        keys.append(key)
        values.append(value)
    hidden = language_model.norm(x[:, : sequences.visible.shape[-1]])
    if torch.is_grad_enabled():
        keys[-1] = _TakePart.apply(keys[-1], hidden)
    return hidden, tuple(keys), tuple(values)


def _run_layer(
    layer: nn.Module, x: Tensor, turn: Tensor, visible: Tensor, visible_to_words: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    prefix = slice(visible.shape[-1])
    query, key, value = project(layer, x, turn)
    attended = attend_grouped(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], visible)
    if visible_to_words is not None:
        words = attend_grouped(query[:, :, prefix.stop :], key, value, visible_to_words)
        attended = torch.cat([attended, words], dim=1)
    return add_attended(layer, x, attended), key, value


def project(layer: nn.Module, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D] -> a Gemma layer's queries [B, N, T, d], keys and values [B, K, T, d]; the first two rotated."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return rotate(query, turn), rotate(key, turn), value


def add_attended(layer: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of the layer: x [B, T, D] with what was attended to [B, T, N * d], and what the MLP makes of both."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))


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
