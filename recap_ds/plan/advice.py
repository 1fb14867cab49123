"""What to change where a recipe does not fit: the first of a list of changes, each on top of those before it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from recap_ds.plan.estimate import Estimate, Setting, estimate
from recap_ds.plan.hardware import Gpu
from recap_ds.plan.sizing import Sizer, with_training


class Variant(NamedTuple):
    """A change of a setting, in the words of the user who makes it."""

    text: str
    setting: Setting


def variants(setting: Setting, gpus_per_node: int) -> list[Variant]:
    """The setting with activation checkpointing, offload and hpZ the other way round, one at a time."""
    found = [_checkpointing(setting, not setting.config.training.activation_checkpointing)]
    found.append(_offload(setting, not _has_offload(setting.ds)))
    if setting.ds["zero_optimization"]["stage"] == 3:
        has_hpz = _hpz_size(setting.ds) > 1
        if has_hpz or setting.world > 1:
            found.append(_hpz(setting, 1 if has_hpz else min(gpus_per_node, setting.world)))
    return found


def find_mend(
    sizer: Sizer, setting: Setting, gpu: Gpu, gpus_per_node: int, memory_gib: float
) -> tuple[list[str], Estimate] | None:
    """The changes that make it fit, and what then comes of it; None where none of them is enough."""
    texts: list[str] = []
    for variant in _mends(setting):
        texts.append(variant.text)
        result = estimate(sizer, variant.setting, gpu, gpus_per_node)
        if result.fits(memory_gib):
            # Only the last word on the batch size counts.
            return [text for text in texts if text == texts[-1] or "batch_size" not in text], result
    return None


def _mends(setting: Setting) -> Iterator[Variant]:
    """From what costs least to what costs most."""
    if _hpz_size(setting.ds) > 1:
        yield (variant := _hpz(setting, 1))
        setting = variant.setting
    if not setting.config.training.activation_checkpointing:
        yield (variant := _checkpointing(setting, True))
        setting = variant.setting
    micro = setting.config.training.batch_size
    while micro > 1 and micro % 2 == 0:
        micro //= 2
        yield (variant := _smaller_batch(setting, micro))
    setting = variant.setting if micro < setting.config.training.batch_size else setting
    if not _has_offload(setting.ds):
        yield _offload(setting, True)


def _checkpointing(setting: Setting, on: bool) -> Variant:
    text = f"training.activation_checkpointing={str(on).lower()}"
    return Variant(text, setting._replace(config=with_training(setting.config, activation_checkpointing=on)))


def _smaller_batch(setting: Setting, micro: int) -> Variant:
    """With the same global batch."""
    training = setting.config.training
    values: dict[str, Any] = {"batch_size": micro}
    text = f"training.batch_size={micro}"
    if training.global_batch_size is None or training.gradient_accumulation_steps is not None:
        values["gradient_accumulation_steps"] = (
            (training.gradient_accumulation_steps or 1) * training.batch_size // micro
        )
        text += f" training.gradient_accumulation_steps={values['gradient_accumulation_steps']}"
    return Variant(text, setting._replace(config=with_training(setting.config, **values)))


def _offload(setting: Setting, on: bool) -> Variant:
    device = {"device": "cpu", "pin_memory": True} if on else {"device": "none"}
    text = "offload_optimizer to the host" if on else "without offload_optimizer"
    return Variant(text, setting._replace(ds=_with_zero(setting.ds, offload_optimizer=device)))


def _hpz(setting: Setting, size: int) -> Variant:
    text = f"zero_hpz_partition_size {size}" if size > 1 else "without zero_hpz_partition_size"
    return Variant(text, setting._replace(ds=_with_zero(setting.ds, zero_hpz_partition_size=size)))


def _with_zero(ds: dict[str, Any], **values: object) -> dict[str, Any]:
    return {**ds, "zero_optimization": {**ds["zero_optimization"], **values}}


def _has_offload(ds: dict[str, Any]) -> bool:
    return (ds["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def _hpz_size(ds: dict[str, Any]) -> int:
    return ds["zero_optimization"].get("zero_hpz_partition_size", 1)
