"""Low-rank adapters on the VLM's language model, by peft.

Attached after the base is built: under zero.Init a parent (peft's layer) could not initialise the matrices it creates.
peft's own ``autocast_adapter_dtype`` (float32 adapters beside bfloat16 weights) is not used: ZeRO-3 wants one dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recap_ds.config import LoraConfig
from recap_ds.errors import UsageError

ADAPTER = "default"


def peft_config(lora: LoraConfig):
    """The adapter's peft configuration; a pattern, because SigLIP's projections share Gemma's names."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf".*language_model\.layers\..*\.({'|'.join(lora.target_modules)})",
        bias="none",
    )


def add_adapters(paligemma: nn.Module, lora: LoraConfig) -> None:
    """Insert adapters in place; the base stays frozen, the adapters train."""
    from peft import inject_adapter_in_model

    modules = paligemma.language_model.layers.named_modules()
    linear = {name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, nn.Linear)}
    # peft is content when one of the names matches.
    if unknown := [name for name in lora.target_modules if name not in linear]:
        raise UsageError(f"lora.target_modules: no linear layer '{unknown[0]}'; there are {', '.join(sorted(linear))}")
    inject_adapter_in_model(peft_config(lora), paligemma, adapter_name=ADAPTER)
    for name, parameter in paligemma.named_parameters():
        parameter.requires_grad_("lora_" in name)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """Parameter name without peft's wrapping: ``q_proj.base_layer.weight`` -> ``q_proj.weight``."""
    return name.replace(".base_layer.", ".")


def peft_name(name: str) -> str:
    """Name in a peft adapter file for PaliGemmaForConditionalGeneration, from a name inside PaliGemmaModel."""
    return "base_model.model.model." + name.replace(f".{ADAPTER}.", ".")


def merge_adapters(tensors: dict[str, Tensor], lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Base tensors with W + (alpha / r) B A folded in, computed in float32; adapter tensors are consumed.

    ``tensors`` maps wrapped names to tensors; yields ``(base name, tensor)`` in the base's dtype.
    """
    for name, value in tensors.items():
        if is_adapter(name):
            continue
        stem = name.removesuffix(".base_layer.weight")
        down = tensors.get(f"{stem}.lora_A.{ADAPTER}.weight") if stem != name else None
        if down is not None:
            up = tensors[f"{stem}.lora_B.{ADAPTER}.weight"]
            folded = torch.addmm(value.float(), up.float(), down.float(), alpha=lora.alpha / lora.rank)
            value = folded.to(value.dtype)
        yield base_name(name), value
