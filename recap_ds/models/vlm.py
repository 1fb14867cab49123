"""The vision-language model: transformers' PaliGemma, encoded as one bidirectional prefix.

The prefix (images, then prompt) never attends to states, actions or the advantage, so it is encoded once per
observation and read by every head. ``PaliGemmaModel.forward`` is not called: it finds image tokens with ``.item()``, a
device sync, and cannot run on meta. Token embeddings are scaled by sqrt(width) inside transformers' embedding module
and image features are not, as in openpi.

    B batch   C cameras   N patches of one image   L prompt tokens   T = C * N + L prefix tokens   D VLM width
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recap_ds.batch import Observation
from recap_ds.config import LoraConfig, ModelConfig
from recap_ds.errors import UsageError
from recap_ds.models.advantage_words import AdvantageWords
from recap_ds.models.building import Builder, fill
from recap_ds.models.layers import rotary_angles
from recap_ds.models.lora import add_adapters
from recap_ds.models.prefix_keys import Sequences, encode_with_keys
from recap_ds.models.vlm_weights import checkpoint_tensors, load_vlm_config, locate_vlm, random_tensors

TINY = "tiny"
TINY_VOCABULARY = 512  # room for the byte tokenizer's 259
TINY_PATCH_SIZE = 16


class PrefixFeatures(NamedTuple):
    hidden: Tensor  # [B, T, D]
    mask: Tensor  # [B, T] bool, True = a real token
    # Per layer [B, key-value heads, T + E, head dim], keys rotated; empty where no expert asked for them.
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    # [E] int64, of the keys behind the prefix's: the draws that attend to them (``AdvantageWords``). None: E is 0.
    readers: Tensor | None = None


class ConvStem(nn.Module):
    """Image -> patch grid by stride-2 convolutions, in place of SigLIP's one big stride.

    A tiny vision tower trained from scratch hardly learns positions from raw 16 x 16 patches.
    """

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        assert 2**num_halvings == patch_size, "the conv stem needs a patch size that is a power of two"
        channels = [3, *(max(width >> shift, 16) for shift in range(num_halvings - 1, 0, -1)), width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1) for before, after in pairwise(channels)
        )

    @property
    def weight(self) -> nn.Parameter:
        # SigLIP's embedding asks its patch projection for the dtype to cast pixels to.
        return self.convolutions[0].weight

    def forward(self, pixels: Tensor) -> Tensor:
        for convolution in self.convolutions[:-1]:
            pixels = nn.functional.gelu(convolution(pixels))
        return self.convolutions[-1](pixels)


class RotaryEmbedding(nn.Module):
    """Gemma's rotary angles, computed in float32 where they are used.

    transformers keeps the frequencies in a buffer, which zero.Init and ``.to(bfloat16)`` round to three digits: at
    position 800 the angles would be off by a radian.
    """

    def __init__(self, text_config):
        super().__init__()
        rope = text_config.rope_parameters
        assert rope["rope_type"] == "default", f"PaliGemma with {rope['rope_type']} rotary embeddings"
        self.head_dim, self.theta = text_config.head_dim, rope["rope_theta"]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, head_dim] of the positions [B, T], in the dtype of ``x``."""
        angle = rotary_angles(position_ids, self.head_dim, self.theta)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class VisionLanguageModel(nn.Module):
    """Frozen, LoRA-adapted or fully trained PaliGemma; ``trainable`` says whether gradients flow into it."""

    def __init__(
        self,
        config: ModelConfig,
        lora: LoraConfig,
        builder: Builder,
        seed: int,
        folder: str | None = None,
        with_keys: bool = False,
        words: AdvantageWords | None = None,
    ):
        """``with_keys``: the prefix brings every layer's keys and values, for an action expert that attends to them.

        ``words``: what it is told beside the prefix; needs ``with_keys``.
        """
        super().__init__()
        source = Path(folder) if folder else locate_vlm(config.vlm_source)
        vlm_config = tiny_config(config.image_size) if source is None else load_vlm_config(source, config.image_size)
        self.trainable = lora.enabled or not config.freeze_vlm
        # A named folder (an export) always brings weights.
        self.random_init = folder is None and (source is None or config.vlm_random_init)
        self.with_keys = with_keys
        # Buffers, so that they lie where the parameters do.
        self.register_buffer("word_tokens", None if words is None else words.tokens, persistent=False)
        self.register_buffer("word_readers", None if words is None else words.readers, persistent=False)
        self.activation_checkpointing = False
        self.paligemma = build_paligemma(vlm_config, builder, config.conv_stem)
        if self.random_init:
            fill(self.paligemma, random_tensors(self.paligemma, builder, seed), builder)
        else:
            _load(self.paligemma, source, builder)
        self.width = vlm_config.text_config.hidden_size
        self.paligemma.requires_grad_(not config.freeze_vlm)
        if lora.enabled:
            torch.manual_seed(seed)
            add_adapters(self.paligemma, lora)

    @property
    def network(self) -> nn.Module:
        """All of its parameters, whatever the architecture is."""
        return self.paligemma

    def enable_activation_checkpointing(self) -> None:
        self.activation_checkpointing = True
        for tower in (self.paligemma.vision_tower, self.paligemma.language_model):
            tower.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, observation: Observation, pixels: Tensor) -> PrefixFeatures:
        """``pixels`` [B, C, 3, P, P] in [-1, 1]: the observation's images, normalised on the device."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self._encode(observation, pixels)

    def _encode(self, observation: Observation, pixels: Tensor) -> PrefixFeatures:
        if self.with_keys:
            words = None if self.word_tokens is None else AdvantageWords(self.word_tokens, self.word_readers)
            return encode_with_layers(self.paligemma, observation, pixels, self.activation_checkpointing, words)
        sequences, mask = embed(self.paligemma, observation, pixels, None)
        hidden = self.paligemma.language_model(
            inputs_embeds=sequences.embeddings,
            attention_mask=sequences.visible.expand(-1, 1, mask.shape[1], -1),
            position_ids=sequences.position_ids,
            use_cache=False,
        ).last_hidden_state
        return PrefixFeatures(hidden, mask)


def build_paligemma(vlm_config, builder: Builder, conv_stem: bool = False) -> nn.Module:
    """PaliGemmaModel without values in its parameters, with rotary angles that no precision rounds."""
    # Imported here: transformers takes seconds, and `recap-ds` verbs without a model should not wait for it.
    from transformers import PaliGemmaModel
    from transformers.initialization import no_init_weights

    with builder.context(), no_init_weights():
        paligemma = PaliGemmaModel(vlm_config)
        if conv_stem:
            vision = vlm_config.vision_config
            paligemma.vision_tower.embeddings.patch_embedding = ConvStem(vision.hidden_size, vision.patch_size)
    paligemma.language_model.rotary_emb = RotaryEmbedding(vlm_config.text_config)
    return paligemma


def embed(
    paligemma: nn.Module, observation: Observation, pixels: Tensor, words: AdvantageWords | None
) -> tuple[Sequences, Tensor]:
    """Images, then prompt, then ``words``; and the prefix's mask [B, T] bool, True = a real token."""
    patches = paligemma.vision_tower(pixels.flatten(0, 1)).last_hidden_state
    images = paligemma.multi_modal_projector(patches).unflatten(0, (len(pixels), -1))  # [B, C, N, D]
    image_mask = observation.camera_mask[:, :, None].expand(-1, -1, images.shape[2])
    tokens = observation.tokens
    if words is not None:
        tokens = torch.cat([tokens, words.tokens.expand(len(tokens), -1)], dim=1)
    embeddings = torch.cat([images.flatten(1, 2), paligemma.language_model.embed_tokens(tokens)], dim=1)
    mask = torch.cat([image_mask.flatten(1), observation.token_mask], dim=1)
    # Bidirectional: every token sees every real token. Positions skip what is masked, as in openpi. A row with no
    # real token (the observation after an end) sees all its padding: attention over nothing may be NaN.
    visible = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
    position_ids, visible_to_words = (mask.long().cumsum(dim=1) - 1).clamp(min=0), None
    if words is not None:
        # Each block goes on where the prefix's real tokens end, as if the other were not there.
        position_ids = torch.cat([position_ids, mask.sum(dim=1, keepdim=True) + words.order()], dim=1)
        within = words.same_block().expand(len(mask), -1, -1)
        visible_to_words = torch.cat([visible[:, 0].expand(-1, within.shape[1], -1), within], dim=2)
    return Sequences(embeddings, position_ids, visible, visible_to_words), mask


def encode_with_layers(
    paligemma: nn.Module,
    observation: Observation,
    pixels: Tensor,
    checkpointing: bool,
    words: AdvantageWords | None = None,
) -> PrefixFeatures:
    """The prefix with every layer's keys and values, and behind them those of ``words``."""
    sequences, mask = embed(paligemma, observation, pixels, words)
    hidden, keys, values = encode_with_keys(paligemma.language_model, sequences, checkpointing)
    return PrefixFeatures(hidden, mask, keys, values, None if words is None else words.readers)


def _load(paligemma: nn.Module, folder: Path, builder: Builder) -> None:
    try:
        fill(paligemma, checkpoint_tensors(folder), builder)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"model.vlm_model_name: {folder} does not hold this PaliGemma: {error}") from None


def tiny_config(image_size: int):
    """PaliGemma's architecture at about a million parameters."""
    from transformers import PaliGemmaConfig

    if image_size % TINY_PATCH_SIZE:
        raise UsageError(f"model.image_size: {image_size} is not a multiple of {TINY_PATCH_SIZE}, the tiny VLM's patch")
    shared = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    return PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": TINY_VOCABULARY,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            **shared,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": image_size,
            "patch_size": TINY_PATCH_SIZE,
            "vision_use_head": False,
            **shared,
        },
        projection_dim=128,
        image_token_index=TINY_VOCABULARY - 1,
    )
