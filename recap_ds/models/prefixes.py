"""Prefixes of one batch: which observations a stage encodes, and with whose images. All [B, ...]."""

from collections.abc import Callable

import torch
from torch import Tensor

from recap_ds.batch import Observation, TransitionBatch
from recap_ds.models.backbones import Vlm
from recap_ds.models.vlm import PrefixFeatures


def encode_both(
    vlm: Vlm, batch: TransitionBatch, pixels: Tensor, next_pixels: Tensor
) -> tuple[PrefixFeatures, PrefixFeatures]:
    """Prefix of o_t (with gradient where the VLM trains) and of o_{t+k} (never)."""
    now, later = batch.observation, batch.next_observation
    if vlm.trainable:
        prefix = vlm(now, pixels)
        with torch.no_grad():
            return prefix, vlm(later, next_pixels)
    both = Observation(*(torch.cat(pair) for pair in zip(now, later, strict=True)))
    encoded = vlm(both, torch.cat([pixels, next_pixels]))
    return _each(lambda part: part.chunk(2)[0], encoded), _each(lambda part: part.chunk(2)[1], encoded)


def encode_shuffled(vlm: Vlm, batch: TransitionBatch, pixels: Tensor) -> PrefixFeatures:
    """Prefix of o_t with the images of the row that lends them, everything else being its own."""
    camera_mask = batch.observation.camera_mask[batch.image_lender]
    return vlm(batch.observation._replace(camera_mask=camera_mask), pixels[batch.image_lender])


def detached(prefix: PrefixFeatures) -> PrefixFeatures:
    return _each(Tensor.detach, prefix)


def _each(function: Callable[[Tensor], Tensor], prefix: PrefixFeatures) -> PrefixFeatures:
    keys, values = (tuple(map(function, layers)) for layers in (prefix.keys, prefix.values))
    return PrefixFeatures(function(prefix.hidden), function(prefix.mask), keys, values, prefix.readers)
