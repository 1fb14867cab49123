"""A critic's own vision-language model (``value.backbone: own``): any architecture that ``own_architecture`` lets pass.

A thin wrapper: the architecture's image path, its token embeddings, its language model, on [image features of every
camera, prompt]; its pixel statistics, tokenizer, image size and attention mask. The tokens that chat models put around
images are left out: a value is read off the whole prefix, not continued as text.

    B batch   C cameras   N tokens of one image   L prompt tokens   T = C * N + L prefix tokens   D width
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recap_ds.batch import Observation
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder, fill
from recap_ds.models.lora import add_adapters
from recap_ds.models.own_architecture import (
    PIXELS_KEY,
    attention_masks,
    image_features,
    load_architecture,
    random_values,
    rehearse,
    restore_tables,
    stored_name_reader,
    with_unreached,
)
from recap_ds.models.vlm import PrefixFeatures
from recap_ds.models.vlm_weights import checkpoint_tensors, locate_vlm


class OwnBackbone(nn.Module):
    """Frozen, LoRA-adapted or fully trained, as ``model.freeze_vlm`` and ``lora`` say."""

    def __init__(self, config: PiStarRECAPConfig, builder: Builder, folder: str | None = None):
        from transformers import AutoModel
        from transformers.initialization import no_init_weights

        super().__init__()
        source, model, seed = config.vlm_source, config.model, config.training.seed
        where = Path(folder) if folder else locate_vlm(source)
        architecture = load_architecture(where, source, model.image_size)
        rehearsal = rehearse(architecture, source, model.image_size)
        self.trainable = not config.vlm_is_frozen
        self.random_init = folder is None and source.random_init
        self.width = rehearsal.width
        with builder.context(), no_init_weights():
            self.network = AutoModel.from_config(architecture)
        restore_tables(self.network)
        values = (
            random_values(rehearsal, seed)
            if self.random_init
            else checkpoint_tensors(where, stored_name_reader(architecture))
        )
        try:
            fill(self.network, with_unreached(values, rehearsal.unreached, self.network, builder), builder)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{source.key}: {where} does not hold this {architecture.model_type}: {error}") from None
        # What no value depends on gets no gradient, and ZeRO-3 has no place for a trainable parameter without one.
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not model.freeze_vlm and name not in rehearsal.unreached)
        if config.lora.enabled:
            torch.manual_seed(seed)
            add_adapters(self.network, config.lora)
        statistics = getattr(architecture, PIXELS_KEY)
        for name, numbers in statistics.items():
            self.register_buffer(name, torch.tensor(numbers)[:, None, None], persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OwnBackbone":
        """Moved anywhere, cast to nothing: in bfloat16, rotary frequencies are off by a radian at position 800."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, leaf = name.rpartition(".")
            buffers = self.get_submodule(owner)._buffers
            buffers[leaf] = buffer.to(buffers[leaf].device)
        return self

    def enable_activation_checkpointing(self) -> None:
        self.network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, observation: Observation, pixels: Tensor) -> PrefixFeatures:
        """``pixels`` [B, C, 3, S, S] in [-1, 1], normalised here as the architecture was trained."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self._encode(observation, pixels)

    def _encode(self, observation: Observation, pixels: Tensor) -> PrefixFeatures:
        network: Any = self.network
        seen = ((pixels.flatten(0, 1) + 1.0) / 2.0 - self.image_mean) / self.image_std
        images = image_features(network, seen.to(network.dtype)).unflatten(0, (len(pixels), -1))  # [B, C, N, D]
        image_mask = observation.camera_mask[:, :, None].expand(-1, -1, images.shape[2]).flatten(1)
        words = network.get_input_embeddings()(observation.tokens)
        embeddings = torch.cat([images.flatten(1, 2).to(words.dtype), words], dim=1)
        mask = torch.cat([image_mask, observation.token_mask], dim=1)
        is_image = torch.arange(mask.shape[1], device=mask.device) < image_mask.shape[1]
        hidden = network.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_masks(network.config, mask, is_image),
            # Positions skip what is masked, so that a missing camera leaves no hole.
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return PrefixFeatures(hidden, mask)
