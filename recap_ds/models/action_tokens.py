"""Action tokens (knowledge insulation, arXiv 2505.23705): the VLM learns to predict a chunk behind its prefix.

Each token sees the prefix and those before it; the prefix and the action expert see none of them, and nothing at
inference knows that they were there. They pass through the language model after the prefix, over its keys and values,
as they would have in one pass; so what the prefix computes is the same to the bit with and without them. The first is
predicted from the prompt's last token. They carry no advantage: the loss shapes features, and nobody acts by it.

Token i is the i-th of the VLM's vocabulary from its end, in PaliGemma's from before its 128 last, special ones, as
openpi has it. Its embedding is also its row of the output layer, as in PaliGemma, and the softmax goes over these rows
alone: which action comes next, given that one does. The whole vocabulary would only add that no word does, at a
thousand times the memory.

    B batch   M action tokens   V action_vocabulary   T prefix tokens   D VLM width   K key-value heads   d head dim
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recap_ds.batch import TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.flow_losses import source_weight
from recap_ds.models.layers import attend_grouped, line_up, rotary_angles, rotation
from recap_ds.models.losses import LossNormalizers, TrainOutput
from recap_ds.models.prefix_keys import add_attended, project
from recap_ds.models.vlm import PrefixFeatures, VisionLanguageModel

PALIGEMMA_VOCABULARY, NUM_SPECIAL = 257_152, 128  # rows of its table beyond these are padding


class ActionTokenOutput(NamedTuple):
    loss_sum: Tensor  # 0-dim with gradient: weighted sum over real tokens
    loss: Tensor  # [B], mean over the sample's tokens, without gradient
    accuracy: Tensor  # [B]


def last_action_word(text_config, action_vocabulary: int) -> int:
    """The word that token 0 takes; token i takes the i-th before it. UsageError where there are too few."""
    is_paligemmas = text_config.vocab_size >= PALIGEMMA_VOCABULARY
    end = PALIGEMMA_VOCABULARY - NUM_SPECIAL if is_paligemmas else text_config.vocab_size
    # At least as many are left to words.
    if 2 * action_vocabulary > end:
        raise UsageError(
            f"model.action_vocabulary: {action_vocabulary} is more than half of the VLM's {end} words; "
            f"set at most {end // 2}"
        )
    return end - 1


def with_action_tokens(
    output: TrainOutput,
    vlm: VisionLanguageModel,
    config: PiStarRECAPConfig,
    batch: TransitionBatch,
    prefix: PrefixFeatures,
    normalizers: LossNormalizers,
) -> TrainOutput:
    """``output`` with this loss added, where the run has it. ``prefix``: of the batch's observation, with gradient."""
    if not config.learns_action_tokens:
        return output
    words = action_token_losses(vlm, batch, prefix, source_weight(config, batch), config.model.action_vocabulary)
    return output._replace(
        loss=output.loss + config.model.action_token_weight * words.loss_sum / normalizers.action_tokens,
        action_token_loss=words.loss,
        action_token_accuracy=words.accuracy,
    )


def action_token_losses(
    vlm: VisionLanguageModel, batch: TransitionBatch, prefix: PrefixFeatures, weight: Tensor, action_vocabulary: int
) -> ActionTokenOutput:
    """``weight`` [B]."""
    tokens, mask = batch.action_tokens, batch.action_token_mask
    language_model = vlm.paligemma.language_model
    last_word = last_action_word(vlm.paligemma.config.text_config, action_vocabulary)
    words = last_word - torch.arange(action_vocabulary, device=tokens.device)
    embeddings = language_model.embed_tokens(words)  # [V, D], scaled by sqrt(D)
    # The last token predicts nothing.
    hidden = _encode(language_model, prefix, embeddings[tokens[:, :-1]], mask[:, :-1], vlm.activation_checkpointing)
    hidden = torch.cat([_last_real(prefix)[:, None], hidden], dim=1).float()
    logits = hidden @ embeddings.float().T * vlm.width**-0.5
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens) * mask
    correct = (logits.detach().argmax(dim=-1) == tokens) & mask
    counts = mask.sum(dim=1).clamp(min=1)
    return ActionTokenOutput(
        (weight * loss.sum(dim=1)).sum(), loss.detach().sum(dim=1) / counts, correct.sum(dim=1) / counts
    )


def _last_real(prefix: PrefixFeatures) -> Tensor:
    """[B, D]: hidden states of the last real token."""
    order = torch.arange(prefix.mask.shape[1], device=prefix.mask.device)
    last = (order * prefix.mask).argmax(dim=1)
    return prefix.hidden.take_along_dim(last[:, None, None], dim=1).squeeze(1)


def _encode(
    language_model: nn.Module, prefix: PrefixFeatures, embeddings: Tensor, mask: Tensor, checkpointing: bool
) -> Tensor:
    """Hidden states [B, M, D] after the last norm, of tokens ``embeddings`` [B, M, D]; ``mask`` [B, M], True = real."""
    length, prefix_length = mask.shape[1], prefix.mask.shape[1]
    order = torch.arange(length, device=mask.device)
    # What pads sees itself, so that no row is without any key.
    own = (order[:, None] >= order) & (mask[:, None] | (order[:, None] == order))
    visible = torch.cat([prefix.mask[:, None].expand(-1, length, -1), own], dim=2)
    rotary, text_config = language_model.rotary_emb, language_model.config
    visible = line_up(visible, text_config.num_attention_heads // text_config.num_key_value_heads)
    angles = rotary_angles(prefix.mask.sum(dim=1, keepdim=True) + order, rotary.head_dim, rotary.theta)
    turn, x = rotation(angles, embeddings.dtype), embeddings
    for layer, keys, values in zip(language_model.layers, prefix.keys, prefix.values, strict=True):
        arguments = (layer, x, turn, keys[:, :, :prefix_length], values[:, :, :prefix_length], visible)
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(_run_layer, *arguments, use_reentrant=False)
        else:
            x = _run_layer(*arguments)
    return language_model.norm(x)


def _run_layer(layer: nn.Module, x: Tensor, turn: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """x [B, M, D]; the prefix's key, value [B, K, T, d]; visible from ``line_up``, True = attends."""
    query, own_key, own_value = project(layer, x, turn)
    key, value = torch.cat([key, own_key], dim=2), torch.cat([value, own_value], dim=2)
    return add_attended(layer, x, attend_grouped(query, key, value, visible))
