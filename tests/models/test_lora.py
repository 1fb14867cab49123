"""Adapters: folding them into the weights, and their names in peft's own files."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PaliGemmaForConditionalGeneration

from recap_ds.models.building import Builder, fill
from recap_ds.models.lora import base_name, is_adapter, merge_adapters, peft_config, peft_name
from recap_ds.models.pixels import to_pixels
from recap_ds.models.vlm import VisionLanguageModel, tiny_config
from tests.tiny import random_observation, wake
from tests.tiny import tiny_config as policy_config

LORA = {"enabled": True, "rank": 4, "alpha": 12.0}
CONFIG = policy_config(lora=LORA)


@pytest.fixture
def adapted():
    vlm = VisionLanguageModel(CONFIG.model, CONFIG.lora, Builder(), seed=0).eval()
    wake(vlm)
    return vlm


def plain():
    config = policy_config()
    return VisionLanguageModel(config.model, config.lora, Builder(), seed=1).eval()


@torch.no_grad()
def encode(vlm):
    observation = random_observation(CONFIG, 2, torch.Generator().manual_seed(0))
    features = vlm(observation, to_pixels(observation.images))
    return features.hidden[features.mask]


def test_merged_weights_give_the_adapters_features(adapted):
    merged = dict(merge_adapters(adapted.paligemma.state_dict(), CONFIG.lora))
    base = plain()
    assert not torch.allclose(encode(base), encode(adapted), atol=1e-2)
    fill(base.paligemma, iter(merged.items()), Builder())
    torch.testing.assert_close(encode(base), encode(adapted), atol=2e-5, rtol=1e-4)


def test_merging_keeps_the_dtype_and_touches_adapted_weights_only(adapted):
    tensors = adapted.bfloat16().paligemma.state_dict()
    merged = dict(merge_adapters(tensors, CONFIG.lora))
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert merged.keys() == plain().paligemma.state_dict().keys()
    bases = {base_name(name): value for name, value in tensors.items() if not is_adapter(name)}
    changed = {name for name in merged if not torch.equal(merged[name], bases[name])}
    assert changed == {base_name(name) for name in tensors if ".base_layer." in name}
    assert len(changed) == 2 * 7


def test_peft_reads_the_adapter_under_our_names(adapted, tmp_path):
    adapters = {peft_name(name): value for name, value in adapted.paligemma.state_dict().items() if is_adapter(name)}
    save_file(adapters, tmp_path / "adapter_model.safetensors")
    peft_config(CONFIG.lora).save_pretrained(tmp_path)
    model = PaliGemmaForConditionalGeneration(tiny_config(32))
    bases = {base_name(n): v for n, v in adapted.paligemma.state_dict().items() if not is_adapter(n)}
    model.model.load_state_dict(bases)
    loaded = PeftModel.from_pretrained(model, tmp_path)
    names = {name for name, _ in loaded.named_parameters() if is_adapter(name)}
    assert {name.replace(".default.", ".") for name in names} == adapters.keys()

    # In transformers' hands it is the same function: put its merged weights into our encoder.
    base = plain()
    fill(base.paligemma, iter(loaded.merge_and_unload().model.state_dict().items()), Builder())
    torch.testing.assert_close(encode(base), encode(adapted), atol=2e-5, rtol=1e-4)
