"""Stages critic and policy: what they build, who gets gradient, and that their losses are what the paper writes."""

import math

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageScale
from recap_ds.errors import UsageError
from recap_ds.models.losses import EvaluationOutput, local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.models.tiny_policy import FROZEN, FULL, LORA, READY, build, gradients, train
from tests.tiny import random_batch, tiny_config, wake

CRITIC = {"training": {"stage": "critic"}}
DISTRIBUTIONAL = {**CRITIC, "value": {"critic": "distributional"}}
HL_GAUSS = {**CRITIC, "value": {"critic": "distributional", "target": "hl_gauss", "num_bins": 51}}
IQL = {**CRITIC, "value": {"critic": "iql"}}
POLICY = {"training": {"stage": "policy"}, "data": {"labels": "some"}}
WEIGHTED = {**POLICY, "recap": {"policy_extraction": "weighted"}}
BOTH = {**POLICY, "recap": {"policy_extraction": "both"}}
SFT = {"training": {"stage": "policy"}, "recap": {"sft": True}}
STAGES = {
    "distributional": DISTRIBUTIONAL,
    "hl_gauss": HL_GAUSS,
    "iql": IQL,
    "conditioned": POLICY,
    "weighted": WEIGHTED,
    "both": BOTH,
    "sft": SFT,
}
HEADS = {"distributional": {"critic"}, "hl_gauss": {"critic"}, "iql": {"critic", "target_critic"}}
NONE, POSITIVE = INDICATOR_IDS["none"], INDICATOR_IDS["positive"]


def evaluate(policy, batch) -> EvaluationOutput:
    return policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)


@pytest.mark.parametrize("variant", [FROZEN, LORA, FULL], ids=["frozen", "lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_builds_what_it_trains_and_all_of_it_gets_a_gradient(stage, variant):
    policy, batch = build(**STAGES[stage], **variant)
    assert set(dict(policy.named_children())) == {"vlm"} | HEADS.get(stage, {"action_expert"})
    train(policy, batch).loss.backward()
    parameters = dict(policy.named_parameters())
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    assert trainable == {name for name, p in parameters.items() if p.grad is not None}
    # A bias added to every key shifts no softmax: those gradients are rounding.
    flat = [name for name in trainable if not parameters[name].grad.any()]
    assert [name for name in flat if "key.bias" not in name and "k_proj.bias" not in name] == []
    groups = policy.configure_optimizers().param_groups
    head = "action_expert" if "action_expert" in dict(policy.named_children()) else "critic"
    assert [group["name"] for group in groups] == (["vlm"] if policy.vlm.trainable else []) + [head]
    assert sum(len(group["params"]) for group in groups) == len(trainable)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_any_target_is_zero_not_nan(stage):
    policy, batch = build(**STAGES[stage])
    no = torch.zeros_like
    nothing = batch._replace(
        action_valid=no(batch.action_valid), td_valid=no(batch.td_valid), mc_valid=no(batch.mc_valid)
    )
    output = train(policy, nothing)
    assert output.loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(policy, output.loss).values())


# -- distributional critic --------------------------------------------------------------------------------------


def two_hot_row(value: float, num_bins: int) -> np.ndarray:
    """The mass of one value on evenly spaced points of [-1, 0], by the distances to its neighbours."""
    points = np.linspace(-1.0, 0.0, num_bins)
    spacing = points[1] - points[0]
    return np.maximum(0.0, 1.0 - np.abs(points - min(max(value, -1.0), 0.0)) / spacing)


def test_the_distributional_loss_is_the_mean_cross_entropy_of_known_returns():
    policy, batch = build(**DISTRIBUTIONAL)
    batch = batch._replace(mc_valid=torch.tensor([True, False] * 4))
    logits = {}
    policy.critic.v.register_forward_hook(lambda module, inputs, output: logits.update(v=output.detach()))
    output = train(policy, batch)
    rows = logits["v"].double().numpy()
    log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = np.zeros(8)
    for i in range(0, 8, 2):
        expected[i] = -(two_hot_row(float(batch.mc_return[i]), 201) * log_p[i]).sum()
    np.testing.assert_allclose(output.v_loss.numpy(), expected, rtol=1e-4)
    assert output.loss.item() == pytest.approx(expected.sum() / 4, rel=1e-5)
    mean = np.exp(log_p) @ np.linspace(-1.0, 0.0, 201)
    np.testing.assert_allclose(output.v.numpy(), mean, rtol=1e-5)
    known = batch.mc_valid.numpy()
    np.testing.assert_allclose(
        output.value_error.numpy(), np.abs(mean - batch.mc_return.numpy()) * known, rtol=1e-4, atol=1e-6
    )
    assert output.q is None and output.policy_loss is None and output.indicator is None


def test_hl_gauss_learns_another_target():
    results = {}
    for target in ("two_hot", "hl_gauss"):
        policy, batch = build(**CRITIC, value={"critic": "distributional", "target": target, "num_bins": 51})
        with torch.no_grad():
            # A ramp of logits, the same for every sample.
            policy.critic.v.output.weight.zero_()
            policy.critic.v.output.bias.copy_(torch.linspace(0, 5, 51))
        results[target] = train(policy, batch._replace(mc_return=torch.full((8,), -0.5))).v_loss
    # Both targets are symmetric around the middle bin, and a ramp is linear there.
    torch.testing.assert_close(*results.values(), rtol=1e-5, atol=1e-5)
    # At the end of the range the Gaussian has to lean inwards, away from the likely bins.
    policy, batch = build(**HL_GAUSS)
    with torch.no_grad():
        policy.critic.v.output.weight.zero_()
        policy.critic.v.output.bias.copy_(torch.linspace(0, 5, 51))
    top = torch.zeros(8)
    leaning = train(policy, batch._replace(mc_return=top, mc_valid=torch.ones(8, dtype=torch.bool))).v_loss
    sharp = -torch.linspace(0, 5, 51).log_softmax(dim=0)[-1]
    assert (leaning > sharp + 0.02).all()


def test_a_distributional_critic_starts_near_ignorance_and_can_learn_a_batch():
    policy, batch = build(**DISTRIBUTIONAL, **FROZEN)
    batch = batch._replace(mc_valid=torch.ones(8, dtype=torch.bool))
    optimizer = torch.optim.AdamW(policy.critic.parameters(), lr=3e-3)
    first = policy.training_step(batch)
    assert first["v_loss"].item() == pytest.approx(math.log(201), abs=1.0)
    for _ in range(150):
        optimizer.zero_grad()
        policy.training_step(batch)["loss"].backward()
        optimizer.step()
        policy.update_targets()  # there are none
    assert train(policy, batch).value_error.mean() < 0.05


# -- IQL critic alone -------------------------------------------------------------------------------------------


def test_an_iql_critic_alone_learns_what_it_would_in_stage_joint():
    joint, batch = build(**FROZEN)
    alone, _ = build(**IQL, **FROZEN)
    wanted = joint.state_dict()
    alone.load_state_dict({name: wanted[name] for name in alone.state_dict()})
    ours, theirs = train(alone, batch), train(joint, batch)
    for name in ("q_loss", "v_loss", "q", "v", "advantage", "td_error", "target_gap"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    mine, other = gradients(alone, ours.loss), gradients(joint, theirs.loss)
    assert all(torch.equal(gradient, other[name]) for name, gradient in mine.items())


def test_a_critic_alone_moves_the_vlm_and_one_beside_a_policy_does_not():
    no_actions = {"action_valid": torch.zeros(8, 4, dtype=torch.bool)}
    for stage, reached in (({}, {"critic"}), (IQL, {"critic", "vlm"}), (DISTRIBUTIONAL, {"critic", "vlm"})):
        policy, batch = build(**stage, **FULL)
        loss = train(policy, batch._replace(**no_actions)).loss
        assert {name.split(".")[0] for name, g in gradients(policy, loss).items() if g.any()} == reached


def test_with_stop_gradient_the_critics_train_the_vlm_instead_of_the_policy():
    policy, batch = build(model={"freeze_vlm": False, "stop_gradient": True})
    plain, _ = build(**FULL)
    assert torch.equal(train(policy, batch).loss, train(plain, batch).loss)
    no_actions = batch._replace(action_valid=torch.zeros_like(batch.action_valid))
    no_targets = batch._replace(td_valid=torch.zeros_like(batch.td_valid))
    for part, reached in ((no_actions, {"vlm", "critic"}), (no_targets, {"action_expert"})):
        grads = gradients(policy, train(policy, part).loss)
        assert {name.split(".")[0] for name, g in grads.items() if g.any()} == reached


# -- policy on labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extraction", ["conditioned", "weighted", "both"])
def test_on_the_labels_of_stage_joint_the_policy_learns_the_same(extraction):
    recap = {"policy_extraction": extraction}
    joint, batch = build(**FULL, recap=recap)
    policy, _ = build(**{**POLICY, "recap": recap}, **FULL)
    wanted = joint.state_dict()
    policy.load_state_dict({name: wanted[name] for name in policy.state_dict()})
    decided = train(joint, batch)
    undropped = train(joint, batch._replace(indicator_dropped=torch.zeros_like(batch.indicator_dropped)))
    labels = {
        "label_indicator": undropped.indicator,
        # Where there was no TD target the advantage said nothing; labels say 0.
        "label_advantage": decided.advantage.where(batch.td_valid, 0.0),
    }
    output = train(policy, batch._replace(**labels))
    for name in ("indicator", "weight", "policy_loss"):
        assert torch.equal(getattr(output, name), getattr(decided, name)), name


def test_labels_decide_and_dropped_ones_carry_nothing():
    policy, batch = build(**POLICY)
    output = train(policy, batch)
    assert output.indicator.tolist() == batch.label_indicator.masked_fill(batch.indicator_dropped, NONE).tolist()
    assert output.weight.tolist() == [1.0, 1.0, 2.0] * 2 + [1.0, 1.0]
    # Neither critics' targets nor the thresholds of stage joint play a part.
    other = batch._replace(td_valid=~batch.td_valid, chunk_reward=batch.chunk_reward - 1.0)
    scale = AdvantageScale(torch.zeros(2), READY.sigma, torch.tensor([False, False]))
    assert torch.equal(train(policy, other, scale).loss, output.loss)


def test_supervised_fine_tuning_takes_everything_as_positive():
    policy, batch = build(**SFT)
    indicator = train(policy, batch).indicator
    assert indicator.tolist() == [NONE if dropped else POSITIVE for dropped in batch.indicator_dropped]


def test_weights_of_labels_equal_hand_computed_ones():
    policy, batch = build(**BOTH, iql={"temperature": 0.5})
    output = train(policy, batch)
    for i in range(8):
        exponent = float(batch.label_advantage[i]) / (0.5 * float(READY.sigma[batch.task[i]]))
        weight = (1.0, 1.0, 2.0)[int(batch.source[i])] * min(math.exp(exponent), 100.0)
        assert output.weight[i].item() == pytest.approx(weight, rel=1e-5)
    # A task whose labels were never ranked weighs nothing up or down.
    unranked = READY._replace(sigma=torch.full((2,), torch.inf))
    assert train(policy, batch, unranked).weight.tolist() == [1.0, 1.0, 2.0] * 2 + [1.0, 1.0]


# -- what a stage says of held-out samples ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_says_what_the_stage_knows(stage):
    policy, batch = build(**STAGES[stage])
    output = evaluate(policy.train(), batch)
    flow = {"flow_loss", "actions", "unconditioned_actions"}
    value = {"v_loss", "v", "v_shuffled"} | ({"q", "q_loss"} if stage == "iql" else set())
    expected = value if stage in HEADS else flow
    assert {name for name, part in output._asdict().items() if part is not None} == expected
    assert all(part is None or torch.isfinite(part).all() for part in output)
    again = evaluate(policy, batch)
    assert all(part is None or torch.equal(part, other) for part, other in zip(output, again, strict=True))
    assert policy.training


@pytest.mark.parametrize("stage", ["distributional", "iql"])
def test_shuffled_values_are_those_of_the_neighbours_pictures(stage):
    policy, batch = build(**STAGES[stage])
    output = evaluate(policy, batch)
    now = batch.observation
    mixed = now._replace(images=now.images.roll(1, dims=0), camera_mask=now.camera_mask.roll(1, dims=0))
    torch.testing.assert_close(output.v_shuffled, evaluate(policy, batch._replace(observation=mixed)).v)
    assert (output.v_shuffled - output.v).abs().max() > 1e-6


@pytest.mark.parametrize("stage", ["distributional", "iql", "conditioned"])
def test_augmentation_is_seen_in_training_alone(stage):
    data = {**STAGES[stage].get("data", {}), "augmentation": "shift_and_color"}
    policy, batch = build(**{**STAGES[stage], "data": data})
    plain, _ = build(**STAGES[stage])
    assert not torch.equal(train(policy.train(), batch).loss, train(plain.train(), batch).loss)
    ours, theirs = evaluate(policy, batch), evaluate(plain, batch)
    assert all(part is None or torch.equal(part, other) for part, other in zip(ours, theirs, strict=True))


def test_a_critic_does_not_act():
    policy, batch = build(**DISTRIBUTIONAL)
    with pytest.raises(UsageError, match="stage critic judges and does not act"):
        policy.predict_action_chunk(batch.observation)


def test_plain_training_says_what_the_stage_has():
    for stage, expected in (
        (DISTRIBUTIONAL, {"loss", "v_loss"}),
        (IQL, {"loss", "v_loss", "q_loss", "advantage"}),
        (POLICY, {"loss", "policy_loss"}),
    ):
        policy, batch = build(**stage)
        losses = policy.training_step(batch)
        assert losses.keys() == expected
        assert all(torch.isfinite(value).all() for value in losses.values())


def test_stages_share_the_weights_they_begin_with():
    """The VLM and the action expert of a seed are the same in every stage that has them."""
    policies = [PiStarRECAPPolicy(tiny_config(**stage, **FULL)) for stage in ({}, POLICY, DISTRIBUTIONAL)]
    joint = dict(policies[0].named_parameters())
    for policy in policies[1:]:
        shared = {name: value for name, value in policy.named_parameters() if not name.startswith("critic")}
        assert all(torch.equal(value, joint[name]) for name, value in shared.items())


def test_bfloat16_weights_give_float32_likelihoods_and_values():
    policy, batch = build(**DISTRIBUTIONAL)
    wake(policy)
    exact = train(policy, batch)
    rounded = train(policy.bfloat16(), batch)
    for name in ("loss", "v_loss", "v", "value_error"):
        assert getattr(rounded, name).dtype == torch.float32, name
    torch.testing.assert_close(rounded.v, exact.v, atol=0.02, rtol=0)


def test_rows_that_are_padding_change_nothing():
    policy, batch = build(**DISTRIBUTIONAL)
    padded = batch._replace(
        mc_return=batch.mc_return.where(batch.mc_valid, -0.123), mc_valid=batch.mc_valid & (torch.arange(8) != 3)
    )
    other = random_batch(policy.config, 8, seed=5).observation.images
    images = torch.where((torch.arange(8) == 3).view(8, 1, 1, 1, 1), other, batch.observation.images)
    dirty = padded._replace(observation=batch.observation._replace(images=images))
    assert torch.equal(train(policy, padded).loss, train(policy, dirty).loss)
