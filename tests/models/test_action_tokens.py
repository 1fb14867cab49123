"""Action tokens against transformers' own pass over everything at once; what they move, and what they leave alone."""

import pytest
import torch

from recap_ds.errors import UsageError
from recap_ds.models.action_tokens import action_token_losses, last_action_word
from recap_ds.models.backbones import check_vlm
from recap_ds.models.losses import local_counts
from recap_ds.models.pixels import to_pixels
from recap_ds.models.vlm import tiny_config as tiny_paligemma
from tests.models.test_pi_joint import POLICY, joint, velocity_of
from tests.models.tiny_policy import FULL, LORA, gradients, rows, train
from tests.tiny import tiny_config

NUM_TOKENS, VOCABULARY = 7, 200
QUANTILE = {"data": {"normalization": "quantile"}}


def learning(weight=0.5, insulated=True, **sections):
    """A policy and a batch whose rows have 2 to 7 tokens; ``weight`` 0: the same without them."""
    on = {"action_token_weight": weight, "max_action_tokens": NUM_TOKENS, "action_vocabulary": VOCABULARY}
    model = {**sections.get("model", {}), **on, "stop_gradient": insulated}
    return joint(**{**QUANTILE, **sections, "model": model})


def without_tokens(batch):
    return batch._replace(action_token_mask=torch.zeros_like(batch.action_token_mask))


def loss_in_one_pass(policy, batch):
    """[B, M] cross-entropies: prefix and tokens through transformers' Gemma in one go, then a table of logits."""
    language_model, observation = policy.vlm.paligemma.language_model, batch.observation
    table = language_model.embed_tokens.weight
    images = policy.vlm.paligemma.vision_tower(to_pixels(observation.images).flatten(0, 1)).last_hidden_state
    images = policy.vlm.paligemma.multi_modal_projector(images).unflatten(0, (8, -1)).flatten(1, 2)
    words = 511 - batch.action_tokens
    scale = table.shape[1] ** 0.5
    embeddings = torch.cat([images, scale * table[observation.tokens], scale * table[words]], dim=1)
    num_patches = images.shape[1] // observation.camera_mask.shape[1]
    image_mask = observation.camera_mask.repeat_interleave(num_patches, dim=1)
    prefix = torch.cat([image_mask, observation.token_mask], dim=1)
    real = torch.cat([prefix, batch.action_token_mask], dim=1)
    length = prefix.shape[1]
    visible = real[:, None].expand(-1, real.shape[1], -1).tril()
    visible[:, :length, :length] = prefix[:, None]
    visible = visible | torch.eye(real.shape[1], dtype=torch.bool)
    hidden = language_model(
        inputs_embeds=embeddings,
        attention_mask=visible[:, None],
        position_ids=(real.long().cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    last = length - 1 - prefix.flip(1).long().argmax(dim=1)
    before = torch.cat([hidden[torch.arange(8), last][:, None], hidden[:, length:-1]], dim=1)
    log_probabilities = (before @ table[511 - torch.arange(VOCABULARY)].T).log_softmax(dim=-1)
    return -log_probabilities.take_along_dim(batch.action_tokens[..., None], dim=-1).squeeze(-1)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_the_loss_and_its_gradients_are_those_of_one_pass_over_everything(kind):
    policy, batch = learning(
        **kind, training={"stage": "policy", "activation_checkpointing": True}, recap={"sft": True}
    )
    weight = torch.linspace(0.5, 2.0, 8)
    prefix = policy.vlm(batch.observation, to_pixels(batch.observation.images))
    ours = action_token_losses(policy.vlm, batch, prefix, weight, VOCABULARY)
    expected = loss_in_one_pass(policy, batch) * batch.action_token_mask
    counts = batch.action_token_mask.sum(dim=1)
    assert counts.min() < NUM_TOKENS == counts.max()
    torch.testing.assert_close(ours.loss, expected.detach().sum(dim=1) / counts, atol=1e-4, rtol=1e-4)
    found = gradients(policy, ours.loss_sum)
    theirs = gradients(policy, (weight * expected.sum(dim=1)).sum())
    assert found.keys() == theirs.keys()
    for name, gradient in ((name, gradient) for name, gradient in theirs.items() if "k_proj.bias" not in name):
        torch.testing.assert_close(found[name], gradient, atol=3e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", [{}, POLICY], ids=["joint", "policy"])
def test_the_prefix_the_expert_and_the_critics_are_the_same_to_the_bit(stage):
    (policy, batch), (plain, other) = (learning(weight, insulated=False, **FULL, **stage) for weight in (0.5, 0.0))
    assert policy.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        prefixes = [p.vlm(batch.observation, to_pixels(batch.observation.images)) for p in (policy, plain)]
        assert torch.equal(prefixes[0].hidden, prefixes[1].hidden)
        assert torch.equal(velocity_of(policy, batch), velocity_of(plain, other))
    ours, theirs = train(policy, batch), train(plain, other)
    for name in {"policy_loss", "q", "v", "advantage", "q_loss", "v_loss"}:
        value, expected = ours._asdict()[name], theirs._asdict()[name]
        assert (value is None and expected is None) or torch.equal(value, expected), name
    assert theirs.action_token_loss is None and ours.action_token_loss.min() > 0
    total = (ours.action_token_loss * batch.action_token_mask.sum(dim=1)).sum() / batch.action_token_mask.sum()
    if stage:  # every weight is 1 but that of corrections
        assert policy.config.recap.intervention_weight == 2.0
        assert ours.loss - theirs.loss > 0.5 * total


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [{}, POLICY], ids=["joint", "policy"])
def test_insulated_the_vlm_learns_from_the_tokens_alone_and_all_of_it(stage, kind):
    policy, batch = learning(**kind, **stage)
    found = gradients(policy, train(policy, batch).loss)
    nothing = gradients(policy, train(policy, without_tokens(batch)).loss)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    # A parameter that no loss reaches would be stepped by a stale gradient under ZeRO-3.
    assert found.keys() == nothing.keys() == trained
    vlm = {name for name in trained if name.startswith("vlm.")}
    assert not any(nothing[name].any() for name in vlm)
    assert [name for name in vlm if not found[name].any() and "k_proj.bias" not in name] == []
    for name in trained - vlm:
        assert torch.equal(found[name], nothing[name]) and (nothing[name].any() or "key.bias" in name), name


def test_micro_batches_together_have_the_gradient_of_one():
    policy, batch = learning(**LORA, **POLICY)
    whole = gradients(policy, train(policy, batch).loss)
    halves = [rows(batch, slice(4)), rows(batch, slice(4, 8))]
    counts = torch.stack([local_counts(half) for half in halves]).mean(dim=0)
    parts = [gradients(policy, train(policy, half, counts=counts).loss / 2) for half in halves]
    for name, expected in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected, atol=1e-5, rtol=1e-4)


def test_it_learns_a_batch_and_says_how_often_it_is_right():
    policy, batch = learning(**FULL, **POLICY)
    optimizer = torch.optim.AdamW(policy.vlm.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        losses = policy.training_step(batch)
        losses["loss"].backward()
        optimizer.step()
    output = train(policy, batch)
    assert losses["action_token_loss"] < 0.1
    assert (output.action_token_accuracy > 0.99).all()
    assert train(policy, without_tokens(batch)).action_token_accuracy.max() == 0.0


def test_a_critic_of_the_same_settings_has_nothing_to_do_with_tokens():
    config = learning(**FULL)[0].config
    settings = config.model_dump()
    critic = type(config).model_validate(settings | {"training": settings["training"] | {"stage": "critic"}})
    assert config.num_action_tokens == NUM_TOKENS and critic.num_action_tokens == 0


def test_the_words_they_take():
    small = tiny_paligemma(32).text_config
    assert last_action_word(small, 256) == 511
    small.vocab_size = 257_216
    assert last_action_word(small, 2048) == 257_152 - 1 - 128
    config = tiny_config(
        **QUANTILE,
        **LORA,
        model={
            "action_expert": "pi_joint",
            "action_expert_num_heads": 4,
            "action_token_weight": 1.0,
            "action_vocabulary": 257,
        },
    )
    with pytest.raises(UsageError, match=r"model\.action_vocabulary: 257 is more than half of the VLM's 512 words"):
        check_vlm(config)
