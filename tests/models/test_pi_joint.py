"""The joint expert: the published one-pass form in values and gradients, blind to padding, and in every stage."""

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.errors import UsageError
from recap_ds.models.backbones import check_vlm
from recap_ds.models.building import Builder
from recap_ds.models.experts import pi_dimensions
from recap_ds.models.layers import ZeroEmbedding
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.pi_joint import PiJointExpert
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.vlm import VisionLanguageModel, build_paligemma
from tests.models.pi_one_pass import one_pass_velocity
from tests.models.tiny_policy import FROZEN, FULL, LORA, READY, build, gradients, rows, train
from tests.tiny import tiny_config

VERSIONS = ("pi05", "pi0")
POLICY = {"training": {"stage": "policy"}, "recap": {"sft": True}}
# What follows the last layer's keys and values reaches no action.
TAIL = [
    f"language_model.{part}" for part in ("layers.1.self_attn.q_", "layers.1.self_attn.o_", "layers.1.mlp", "norm.")
]
TAIL.append("language_model.layers.1.post_attention_layernorm")


def joint(version="pi05", **overrides):
    model = {"action_expert": "pi_joint", "action_expert_num_heads": 4, "pi_version": version}
    policy, batch = build(**{**overrides, "model": {**model, **overrides.get("model", {})}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in policy.action_expert.modules():
            if isinstance(module, ZeroEmbedding):
                module.weight.copy_(0.3 * torch.randn(module.weight.shape, generator=generator))
    return policy, batch


def velocity_of(policy, batch, indicator=0):
    expert = policy.action_expert
    prefix = policy.vlm(batch.observation, to_pixels(batch.observation.images))
    x_t, state = batch.noise, batch.observation.state
    ids = torch.full_like(batch.time, indicator, dtype=torch.long)
    return expert(expert.encode_prefix(prefix), state, x_t, batch.time, ids, batch.action_valid)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_two_passes_have_the_values_and_gradients_of_one(version, checkpointing):
    policy, batch = joint(version, **FULL, training={"activation_checkpointing": checkpointing, "stage": "joint"})
    batch = batch._replace(action_valid=torch.ones_like(batch.action_valid))
    weight = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(5))
    positive = INDICATOR_IDS["positive"]
    velocity = velocity_of(policy, batch, positive)
    ours = gradients(policy, (weight * velocity).sum())

    expert, pixels = policy.action_expert, to_pixels(batch.observation.images)
    extra = expert.indicator_in.weight[positive].expand(8, -1)
    draws = [
        one_pass_velocity(
            policy.vlm.paligemma, expert, batch.observation, pixels, batch.noise[:, f], batch.time[:, f], extra
        )
        for f in range(batch.time.shape[1])
    ]
    expected = torch.stack(draws, dim=1)
    torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=1e-4)
    theirs = gradients(policy, (weight * expected).sum())
    assert {name for name in ours if ours[name].any()} == {name for name in theirs if theirs[name].any()}
    # A bias added to every key shifts no softmax: those gradients are rounding.
    for name, gradient in ((name, gradient) for name, gradient in theirs.items() if "k_proj.bias" not in name):
        torch.testing.assert_close(ours[name], gradient, atol=2e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name)


def test_keys_are_handed_out_without_changing_the_prefix():
    config = tiny_config()
    observation = build()[1].observation
    with_keys, without = (
        VisionLanguageModel(config.model, config.lora, Builder(), 0, with_keys=keys) for keys in (True, False)
    )
    ours, theirs = (vlm(observation, to_pixels(observation.images)) for vlm in (with_keys, without))
    torch.testing.assert_close(ours.hidden[ours.mask], theirs.hidden[theirs.mask], atol=2e-5, rtol=1e-4)
    assert len(ours.keys) == len(ours.values) == 2 and theirs.keys == theirs.values == ()
    assert ours.keys[0].shape == (8, 1, ours.mask.shape[1], 32)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_what_is_masked_changes_nothing(version):
    policy, batch = joint(version)
    clean = velocity_of(policy, batch)
    observation, valid = batch.observation, batch.action_valid[:, None, :, None]
    dirty = batch._replace(
        noise=torch.where(valid, batch.noise, 9.0),
        observation=observation._replace(
            tokens=torch.where(observation.token_mask, observation.tokens, 77),
            images=torch.where(observation.camera_mask[:, :, None, None, None], observation.images, 200),
        ),
    )
    changed = torch.where(valid, velocity_of(policy, dirty) - clean, 0.0)
    torch.testing.assert_close(changed, torch.zeros_like(changed), atol=1e-5, rtol=0.0)
    # Rows and draws are on their own.
    torch.testing.assert_close(velocity_of(policy, rows(batch, slice(2, 4))), clean[2:4], atol=1e-5, rtol=1e-4)
    one = batch._replace(noise=batch.noise[:, 1:], time=batch.time[:, 1:])
    torch.testing.assert_close(velocity_of(policy, one), clean[:, 1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_only_pi0_is_shown_the_state_and_only_its_actions_see_it():
    for version in VERSIONS:
        policy, batch = joint(version)
        other = batch._replace(observation=batch.observation._replace(state=batch.observation.state + 1.0))
        assert torch.equal(velocity_of(policy, other), velocity_of(policy, batch)) == (version == "pi05")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_expert_is_indifferent_to_the_indicator(version):
    config = tiny_config(model={"action_expert": "pi_joint", "action_expert_num_heads": 4, "pi_version": version})
    policy, batch = PiStarRECAPPolicy(config), build()[1]
    with torch.no_grad():
        assert torch.equal(velocity_of(policy, batch, 0), velocity_of(policy, batch, INDICATOR_IDS["positive"]))
    woken, _ = joint(version)
    with torch.no_grad():
        assert (velocity_of(woken, batch, 0) - velocity_of(woken, batch, 2)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [FROZEN, LORA, FULL], ids=["frozen", "lora", "full"])
@pytest.mark.parametrize("stage", [{}, POLICY], ids=["joint", "policy"])
def test_every_trainable_parameter_takes_part_and_only_the_tail_in_vain(stage, variant):
    policy, batch = joint(**{**stage, **variant})
    found = gradients(policy, train(policy, batch).loss)
    assert found.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    in_vain = {name for name in found if not found[name].any() and "key.bias" not in name and "k_proj.bias" not in name}
    # Of a fresh adapter half the matrices have no gradient yet; ``wake`` has woken these.
    assert in_vain == {name for name in found if name.startswith("vlm.") and any(part in name for part in TAIL)}


def test_an_insulated_vlm_gets_exactly_nothing_from_the_actions():
    insulated = {"model": {"stop_gradient": True, "freeze_vlm": False}}
    policy, batch = joint(**insulated)
    no_targets = batch._replace(td_valid=torch.zeros_like(batch.td_valid))
    found = gradients(policy, train(policy, no_targets).loss)
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("vlm."))
    assert any(gradient.any() for name, gradient in found.items() if name.startswith("action_expert."))
    # The critics train all of it in the expert's place.
    found = gradients(policy, train(policy, batch).loss)
    assert all(found[name].any() for name in found if name.startswith("vlm.") and "k_proj.bias" not in name)


def test_critics_do_not_see_which_expert_reads_beside_them():
    policy, batch = joint(**FROZEN)
    other, _ = build(**FROZEN)
    other.critic.load_state_dict(policy.critic.state_dict())
    other.target_critic.load_state_dict(policy.target_critic.state_dict())
    for name in ("q", "v", "advantage"):
        ours, theirs = (getattr(train(which, batch), name) for which in (policy, other))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_learns_acts_and_evaluates(version):
    policy, batch = joint(version, **POLICY, **FROZEN)
    optimizer = torch.optim.AdamW(policy.action_expert.parameters(), lr=2e-3)
    batch = batch._replace(indicator_dropped=torch.zeros_like(batch.indicator_dropped))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = policy.training_step(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    output = policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)
    noise, dims = batch.noise[:, 0], batch.action_dim_mask
    acted = policy.predict_action_chunk(batch.observation, noise=noise, action_dim_mask=dims)
    torch.testing.assert_close(acted, output.actions, atol=1e-5, rtol=1e-4)
    guided, plain = (
        policy.predict_action_chunk(batch.observation, noise=noise, action_dim_mask=dims, guidance_beta=beta)
        for beta in (2.0, 1.0)
    )
    assert torch.equal(plain, acted) and not torch.allclose(guided, plain)


def test_an_export_brings_it_back(tmp_path):
    policy, batch = joint("pi0", **POLICY, **LORA)
    policy.save_pretrained(tmp_path / "export")
    loaded = PiStarRECAPPolicy.from_pretrained(tmp_path / "export")
    ours, theirs = (
        which.predict_action_chunk(batch.observation, noise=batch.noise[:, 0]) for which in (policy, loaded)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"action_expert_num_layers": 3}, r"model\.action_expert_num_layers: 3, but .* which has 2"),
        ({"action_expert_num_heads": 2}, r"model\.action_expert_num_heads: 2, but .* which has 4"),
    ],
)
def test_an_expert_that_does_not_match_the_vlm_is_refused_before_anything_starts(model, message):
    config = tiny_config(model={"action_expert": "pi_joint", "action_expert_num_heads": 4, **model})
    for refusing in (check_vlm, PiStarRECAPPolicy):
        with pytest.raises(UsageError, match=message):
            refusing(config)
    # A critic has no expert to mismatch.
    check_vlm(tiny_config(model={"action_expert": "pi_joint", **model}, training={"stage": "critic"}))


def test_another_language_model_and_dropout_are_refused():
    from transformers import Gemma2Config

    model = tiny_config(model={"action_expert": "pi_joint"}).model
    with pytest.raises(UsageError, match=r"model\.action_expert: pi_joint .* is gemma2; set dit_cross"):
        pi_dimensions(model, Gemma2Config())
    with pytest.raises(ValueError, match=r"model\.action_expert_dropout: pi_joint has none"):
        tiny_config(model={"action_expert": "pi_joint", "action_expert_dropout": 0.1})


@pytest.mark.parametrize(("version", "expected"), [("pi05", 3_353_433_872), ("pi0", 3_238_048_528)])
def test_the_published_sizes(version, expected):
    from transformers import PaliGemmaConfig

    gemma = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
    gemma |= {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257_152}
    siglip = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    siglip |= {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 224, "patch_size": 14}
    architecture = PaliGemmaConfig(text_config=gemma, vision_config=siglip, projection_dim=2048)
    model = {"action_expert": "pi_joint", "action_expert_hidden_size": 1024, "action_expert_num_layers": 18}
    model = tiny_config(model={**model, "action_expert_num_heads": 8, "pi_version": version}).model
    with torch.device("meta"):
        modules = (
            build_paligemma(architecture, Builder()),
            PiJointExpert(pi_dimensions(model, architecture.text_config), 32, 32),
        )
    total = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert total - modules[1].indicator_in.weight.numel() == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_is_a_rounding_of_float32(version):
    policy, batch = joint(version, **LORA)
    with torch.no_grad():
        exact = velocity_of(policy, batch)
    policy.bfloat16()
    rounded = velocity_of(policy, batch)
    assert rounded.dtype == torch.float32
    valid = batch.action_valid[:, None, :, None]
    assert ((rounded - exact) * valid).norm() < 0.03 * (exact * valid).norm()
    assert all(gradient.isfinite().all() for gradient in gradients(policy, rounded.square().sum()).values())
