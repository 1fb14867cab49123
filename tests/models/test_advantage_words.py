"""The advantage in words: the paper's block mask in values and gradients, one encoding for all, critics untouched."""

from collections import Counter

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.tokens import ByteTokenizer
from tests.models.pi_one_pass import one_pass_velocity
from tests.models.tiny_policy import FULL, LORA, READY, build, gradients, train
from tests.tiny import tiny_config

NONE, NEGATIVE, POSITIVE = (INDICATOR_IDS[name] for name in ("none", "negative", "positive"))
WORDS = {
    NONE: [],
    NEGATIVE: ByteTokenizer().encode_text("Advantage: negative")[1:],
    POSITIVE: ByteTokenizer().encode_text("Advantage: positive")[1:],
}
POLICY = {"training": {"stage": "policy"}, "data": {"labels": "some"}}


def told(version="pi05", **overrides):
    model = {"action_expert": "pi_joint", "action_expert_num_heads": 4, "pi_version": version}
    model |= {"advantage_conditioning": "text", **overrides.pop("model", {})}
    return build(**overrides, model=model)


def velocity_of(policy, batch, indicator):
    """``indicator`` [B, F]."""
    expert, observation = policy.action_expert, batch.observation
    context = expert.encode_prefix(policy.vlm(observation, to_pixels(observation.images)))
    return expert(context, observation.state, batch.noise, batch.time, indicator, batch.action_valid)


def every(batch, indicator):
    return torch.full_like(batch.time, indicator, dtype=torch.long)


@pytest.mark.parametrize("version", ["pi05", "pi0"])
def test_each_draw_reads_its_own_words_as_if_there_were_no_others(version):
    policy, batch = told(version, **FULL, training={"activation_checkpointing": True})
    batch = batch._replace(action_valid=torch.ones_like(batch.action_valid))
    indicator = (torch.arange(16).view(8, 2) * 2 + torch.arange(2)) % 3  # all pairs of the three
    weight = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(5))
    velocity = velocity_of(policy, batch, indicator)
    ours = gradients(policy, (weight * velocity).sum())

    pixels, expected = to_pixels(batch.observation.images), torch.zeros_like(velocity)
    for number, words in WORDS.items():
        draws = [
            one_pass_velocity(
                policy.vlm.paligemma,
                policy.action_expert,
                batch.observation,
                pixels,
                batch.noise[:, draw],
                batch.time[:, draw],
                words=words,
            )
            for draw in range(2)
        ]
        expected = torch.where((indicator == number)[..., None, None], torch.stack(draws, dim=1), expected)
    torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=1e-4)
    theirs = gradients(policy, (weight * expected).sum())
    for name, gradient in theirs.items():
        if "k_proj.bias" not in name:  # of no consequence to a softmax: rounding
            torch.testing.assert_close(ours[name], gradient, atol=2e-4 * float(gradient.abs().max()), rtol=1e-3)


@torch.no_grad()
def test_words_reach_the_draws_that_read_them_and_nothing_else():
    policy, batch = told()
    before = {number: velocity_of(policy, batch, every(batch, number)) for number in WORDS}
    pixels = to_pixels(batch.observation.images)
    hidden = policy.vlm(batch.observation, pixels).hidden
    policy.vlm.word_tokens[policy.vlm.word_readers == POSITIVE] += 7
    assert torch.equal(policy.vlm(batch.observation, pixels).hidden, hidden)
    for number in (NONE, NEGATIVE):
        assert torch.equal(velocity_of(policy, batch, every(batch, number)), before[number])
    assert (velocity_of(policy, batch, every(batch, POSITIVE)) - before[POSITIVE]).abs().max() > 1e-3
    assert (before[NEGATIVE] - before[POSITIVE]).abs().max() > 1e-3
    # Not told is as if there were no words.
    silent = PiStarRECAPPolicy(
        tiny_config(model={**policy.config.model.model_dump(), "advantage_conditioning": "embedding"})
    )
    silent.load_state_dict(policy.state_dict(), strict=False)
    torch.testing.assert_close(velocity_of(silent, batch, every(batch, NONE)), before[NONE], atol=1e-5, rtol=1e-4)


def test_critics_are_bit_for_bit_the_same_whatever_is_said():
    policy, batch = told()
    dropped, kept = (
        train(policy, batch._replace(indicator_dropped=torch.full_like(batch.indicator_dropped, whether)))
        for whether in (True, False)
    )
    assert (dropped.indicator == NONE).all() and (kept.indicator == POSITIVE).any()
    for name in ("q", "v", "advantage", "td_error", "q_loss", "v_loss"):
        assert torch.equal(getattr(dropped, name), getattr(kept, name)), name
    told_rows = kept.indicator != NONE
    assert torch.equal(dropped.policy_loss[~told_rows], kept.policy_loss[~told_rows])
    assert (dropped.policy_loss != kept.policy_loss)[told_rows].all()


@pytest.mark.parametrize("variant", [LORA, FULL], ids=["lora", "full"])
def test_every_trainable_parameter_takes_part(variant):
    policy, batch = told(**POLICY, **variant)
    found = gradients(policy, train(policy, batch).loss)
    assert found.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert not any("indicator" in name for name in found)


def test_guided_sampling_encodes_once_whatever_the_steps_and_branches():
    policy, batch = told(**POLICY)
    calls = Counter()
    for name, module in policy.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    policy.predict_action_chunk(batch.observation, guidance_beta=2.0, num_steps=7)
    assert {count for name, count in calls.items() if name.startswith("vlm.")} == {1}
    assert {count for name, count in calls.items() if name.startswith("action_expert.")} == {7}


@torch.no_grad()
def test_guided_rows_are_those_of_both_branches():
    policy, batch = told(**POLICY)
    noise, dims = batch.noise[:, 0], batch.action_dim_mask
    options = {"noise": noise, "action_dim_mask": dims, "num_steps": 1}
    plain, negative, positive, guided = (
        policy.predict_action_chunk(batch.observation, advantage=name, guidance_beta=beta, **options)
        for name, beta in ((None, 1.0), ("negative", 1.0), ("positive", 1.0), ("positive", 2.0))
    )
    torch.testing.assert_close(guided, plain + 2.0 * (positive - plain), atol=1e-5, rtol=1e-4)
    mixed = policy.predict_action_chunk(
        batch.observation, advantage=["negative", "positive"] * 4, guidance_beta=1.0, **options
    )
    torch.testing.assert_close(mixed[0::2], negative[0::2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1::2], positive[1::2], atol=1e-5, rtol=1e-4)
    assert (negative - positive).abs().max() > 1e-3


def test_it_is_evaluated_and_exported_with_its_words(tmp_path):
    policy, batch = told(**POLICY, **LORA)
    output = policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)
    assert (output.flow_loss[:, NEGATIVE] != output.flow_loss[:, POSITIVE]).any()
    policy.save_pretrained(tmp_path / "export")
    loaded = PiStarRECAPPolicy.from_pretrained(tmp_path / "export")
    noise, dims = batch.noise[:, 0], batch.action_dim_mask
    acted = loaded.predict_action_chunk(batch.observation, noise=noise, action_dim_mask=dims)
    torch.testing.assert_close(acted, output.actions, atol=1e-6, rtol=1e-5)
    assert not torch.equal(output.actions, output.unconditioned_actions)
