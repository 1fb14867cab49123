"""What to change where a recipe does not fit: one change on top of another until it does."""

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
    texts: dict[str, str] = {}  # a later batch size stands in place of an earlier one
    asked = setting
    result = estimate(sizer, setting, gpu, gpus_per_node)
    while not result.fits(memory_gib):
        variant = _next_mend(setting, result.memory.fullest)
        if variant is None:
            return None
        if _has_offload(variant.setting.ds) and not _has_offload(setting.ds):
            # It frees so much that the smaller changes may not be needed at all.
            variant, texts = _offload(asked, True), {}
        setting = variant.setting
        texts[variant.text.partition("=")[0]] = variant.text
        result = estimate(sizer, setting, gpu, gpus_per_node)
    return list(texts.values()), result


def _next_mend(setting: Setting, fullest: str) -> Variant | None:
    """What costs least of that which helps at the moment that holds most."""
    config = setting.config
    if _hpz_size(setting.ds) > 1:
        return _hpz(setting, 1)
    if fullest == "backward" and not config.training.activation_checkpointing:
        return _checkpointing(setting, True)
    if fullest == "backward" and config.training.batch_size % 2 == 0:
        return _smaller_batch(setting, config.training.batch_size // 2)
    if fullest == "evaluation" and config.evaluation.batch_size > 1:
        return _smaller_evaluation(setting, config.evaluation.batch_size // 2)
    return None if _has_offload(setting.ds) else _offload(setting, True)


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


def _smaller_evaluation(setting: Setting, batch_size: int) -> Variant:
    evaluation = setting.config.evaluation.model_copy(update={"batch_size": batch_size})
    config = setting.config.model_copy(update={"evaluation": evaluation})
    return Variant(f"evaluation.batch_size={batch_size}", setting._replace(config=config))


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
