"""The prefix: equal to transformers' own forward, bidirectional, blind to what is masked; frozen, LoRA and full."""

import pytest
import torch
from transformers import PaliGemmaModel
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding

from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.pixels import to_pixels
from recap_ds.models.vlm import VisionLanguageModel, tiny_config
from tests.tiny import random_observation, wake
from tests.tiny import tiny_config as policy_config

LORA = {"enabled": True, "rank": 4}


def build(seed=0, lora=None, **model):
    config = policy_config(model=model, lora=lora or {})
    return VisionLanguageModel(config.model, config.lora, Builder(), seed)


def observe(batch_size=3, num_cameras=2, seed=0):
    return random_observation(policy_config(), batch_size, torch.Generator().manual_seed(seed), num_cameras)


def encode(vlm, observation):
    return vlm(observation, to_pixels(observation.images))


def shake(module, seed=0):
    """Move every parameter, norms and biases too, so that each would be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_prefix_equals_transformers_own_forward():
    vlm = build()
    shake(vlm)
    reference = PaliGemmaModel(tiny_config(32)).eval()
    reference.load_state_dict(vlm.paligemma.state_dict())
    observation = observe(num_cameras=1)
    features = encode(vlm, observation)

    num_patches = (32 // 16) ** 2
    image_tokens = torch.full((3, num_patches), reference.config.image_token_id)
    mask = torch.cat([torch.ones_like(image_tokens, dtype=torch.bool), observation.token_mask], dim=1)
    assert torch.equal(features.mask, mask)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.cat([image_tokens, observation.tokens], dim=1),
            pixel_values=to_pixels(observation.images)[:, 0],
            attention_mask=mask.long(),
            token_type_ids=torch.zeros_like(mask, dtype=torch.long),
        ).last_hidden_state
    torch.testing.assert_close(features.hidden[mask], expected[mask], atol=2e-5, rtol=1e-4)


def test_the_prefix_is_bidirectional():
    vlm, observation = build(), observe()
    last = observation.token_mask.sum(dim=1) - 1
    tokens = observation.tokens.scatter(1, last[:, None], 7)
    first, other = encode(vlm, observation).hidden[:, 0], encode(vlm, observation._replace(tokens=tokens)).hidden[:, 0]
    assert (first - other).abs().amax(dim=1).min() > 1e-4


def test_masked_cameras_and_padded_tokens_change_nothing():
    vlm, observation = build(), observe(8)
    assert not observation.camera_mask.all()
    assert not observation.token_mask.all()
    noise = observe(8, seed=1)
    dirty = observation._replace(
        images=torch.where(observation.camera_mask[:, :, None, None, None], observation.images, noise.images),
        tokens=torch.where(observation.token_mask, observation.tokens, noise.tokens),
    )
    clean, features = encode(vlm, observation), encode(vlm, dirty)
    torch.testing.assert_close(features.hidden[features.mask], clean.hidden[clean.mask])


def test_a_masked_camera_equals_a_robot_without_it():
    vlm, observation = build(), observe(num_cameras=2)
    mask = torch.tensor([True, False]).expand(3, -1)
    alone = encode(vlm, observation._replace(images=observation.images[:, :1], camera_mask=mask[:, :1]))
    features = encode(vlm, observation._replace(camera_mask=mask))
    torch.testing.assert_close(features.hidden[features.mask], alone.hidden[alone.mask])


def test_an_observation_without_a_real_token_stays_finite():
    vlm, observation = build(), observe()
    nothing = Observation(*(torch.zeros_like(part) for part in observation))
    seen = []
    vlm.paligemma.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    features = encode(vlm, nothing)
    # Some attention kernels return NaN for a query that may attend to nothing; none is asked to.
    assert seen[0].any(dim=-1).all()
    assert not features.mask.any()
    assert features.hidden.isfinite().all()


def test_frozen_keeps_nothing_for_backward():
    vlm, kept = build(freeze_vlm=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        features = encode(vlm, observe())
    assert not vlm.trainable
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    assert not features.hidden.requires_grad
    assert kept == []


def test_full_training_reaches_every_parameter():
    vlm = build(freeze_vlm=False)
    features = encode(vlm, observe())
    features.hidden[features.mask].square().sum().backward()
    unreached = [name for name, p in vlm.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


def test_lora_trains_adapters_of_the_language_model_only():
    vlm = build(lora=LORA)
    trainable = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in vlm.named_parameters() if "lora_" in name}
    assert all(name.startswith("paligemma.language_model.layers.") for name in trainable)
    assert len(trainable) == 2 * 2 * 7  # A and B, two layers, seven projections
    wake(vlm)
    features = encode(vlm, observe())
    features.hidden[features.mask].square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in vlm.named_parameters() if name in trainable)
    assert all(parameter.grad is None for name, parameter in vlm.named_parameters() if name not in trainable)


def test_lora_starts_as_the_base():
    base, adapted, observation = build(), build(lora=LORA), observe()
    torch.testing.assert_close(encode(adapted, observation).hidden.detach(), encode(base, observation).hidden)
    wake(adapted)
    assert not torch.allclose(encode(adapted, observation).hidden, encode(base, observation).hidden, atol=1e-2)


def test_lora_target_modules_must_exist():
    with pytest.raises(UsageError, match=r"lora.target_modules: no linear layer 'q_prj'; there are down_proj, "):
        build(lora=LORA | {"target_modules": ("k_proj", "q_prj")})


@pytest.mark.parametrize("variant", [{"freeze_vlm": False}, {"lora": LORA}])
def test_activation_checkpointing_gives_equal_gradients(variant):
    gradients = []
    for checkpointing in (False, True):
        vlm = build(**variant)
        if checkpointing:
            vlm.enable_activation_checkpointing()
        vlm.train()
        wake(vlm)
        features = encode(vlm, observe())
        features.hidden[features.mask].square().sum().backward()
        gradients.append([parameter.grad for parameter in vlm.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


def test_rotary_angles_are_exact_in_any_dtype():
    config = tiny_config(32).text_config
    positions = torch.arange(1000)[None]
    expected = GemmaRotaryEmbedding(config)(torch.zeros(1), positions)
    vlm = build().bfloat16()
    cos, sin = vlm.paligemma.language_model.rotary_emb(torch.zeros(1), positions)
    torch.testing.assert_close(cos, expected[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(sin, expected[1], atol=2e-4, rtol=0)
    assert [name for name, buffer in vlm.named_buffers() if "rotary" in name and buffer.is_floating_point()] == []


def test_bfloat16_features_are_close_to_float32_ones():
    observation = observe()
    expected = encode(build(), observation)
    features = encode(build().bfloat16(), observation)
    assert features.hidden.dtype == torch.bfloat16
    error = (features.hidden.float() - expected.hidden)[expected.mask].square().mean().sqrt()
    assert error < 0.03 * expected.hidden[expected.mask].square().mean().sqrt()


def test_random_weights_depend_on_the_seed_alone():
    first = build(seed=3).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    again, other, stem = build(seed=3).state_dict(), build(seed=4).state_dict(), build(seed=3, conv_stem=True)
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert not torch.equal(*(state["paligemma.language_model.embed_tokens.weight"] for state in (first, other)))
    # Keyed by name: another module elsewhere moves nothing.
    shared = [name for name in stem.state_dict() if "patch_embedding" not in name]
    assert all(torch.equal(first[name], stem.state_dict()[name]) for name in shared)


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_conv_stem_stands_in_for_the_patch_projection(image_size):
    vlm = build(conv_stem=True, freeze_vlm=False, image_size=image_size)
    config = policy_config(model={"image_size": image_size})
    observation = random_observation(config, 2, torch.Generator().manual_seed(0))
    features = encode(vlm, observation)
    assert features.hidden.shape == (2, 2 * (image_size // 16) ** 2 + config.model.max_prompt_tokens, vlm.width)
    features.hidden[features.mask].square().sum().backward()
    stem = vlm.paligemma.vision_tower.embeddings.patch_embedding
    assert all(parameter.grad.any() for parameter in stem.parameters())


def test_the_tiny_vlm_refuses_an_image_size_it_cannot_cut_into_patches():
    with pytest.raises(UsageError, match=r"model.image_size: 72 is not a multiple of 16"):
        build(image_size=72)
