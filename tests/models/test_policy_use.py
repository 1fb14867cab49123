"""The policy over time: construction, targets, held-out evaluation, learning, and acting."""

import pytest
import torch

from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.models.tiny_policy import FROZEN, FULL, LORA, READY, build
from tests.tiny import random_batch, tiny_config


def evaluate(policy, batch):
    return policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)


def test_construction_depends_on_the_seed_alone_and_leaves_the_generator():
    first = PiStarRECAPPolicy(tiny_config()).state_dict()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = PiStarRECAPPolicy(tiny_config()).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], value) for name, value in again.items())
    other = PiStarRECAPPolicy(tiny_config(training={"seed": 1})).state_dict()
    assert not torch.equal(first["action_expert.state_in.weight"], other["action_expert.state_in.weight"])
    # Adapters draw numbers of their own; the expert and the critics do not feel it.
    adapted = PiStarRECAPPolicy(tiny_config(**LORA)).state_dict()
    rest = [name for name in first if not name.startswith("vlm.")]
    assert all(torch.equal(first[name], adapted[name]) for name in rest)


def test_targets_start_equal_and_follow_by_the_update_rate():
    policy, batch = build(iql={"target_update_rate": 0.1})
    pairs = list(zip(policy.target_critic.parameters(), policy.critic.q.parameters(), strict=True))
    assert all(torch.equal(target, online) and not target.requires_grad for target, online in pairs)
    optimizer = policy.configure_optimizers()
    policy.training_step(batch)["loss"].backward()
    optimizer.step()
    before = [target.clone() for target, _ in pairs]
    policy.update_targets()
    for (target, online), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * online)
    assert any(not torch.equal(target, old) for (target, _), old in zip(pairs, before, strict=True))


@pytest.mark.parametrize("variant", [FROZEN, LORA | {"lora": {"enabled": True, "dropout": 0.5}}])
def test_evaluation_leaves_no_trace(variant):
    policy, batch = build(**variant)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    before = torch.random.get_rng_state()
    first, second = evaluate(policy, batch), evaluate(policy, batch)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(first, second, strict=True))
    assert all(module.training for module in policy.modules())


def test_evaluation_measures_what_training_does():
    policy, batch = build()
    policy.eval()
    out, trained = evaluate(policy, batch), policy(batch, "train", READY, normalizers(local_counts(batch)), False)
    for name in ("q", "v", "q_loss", "v_loss"):
        torch.testing.assert_close(getattr(out, name), getattr(trained, name), msg=name)
    columns = out.flow_loss.gather(1, trained.indicator[:, None])[:, 0]
    torch.testing.assert_close(columns, trained.policy_loss)
    assert not policy.training


def test_shuffled_images_are_those_of_the_row_that_lends_them():
    policy, batch = build()
    now = batch.observation
    lender = torch.tensor([3, 0, 7, 7, 4, 1, 2, 0])
    swapped = now._replace(images=now.images[lender], camera_mask=now.camera_mask[lender])
    out = evaluate(policy, batch._replace(image_lender=lender))
    torch.testing.assert_close(out.v_shuffled, evaluate(policy, batch._replace(observation=swapped)).v)
    assert not torch.allclose(out.v_shuffled, out.v)


def test_training_lowers_the_loss_and_conditioning_takes_hold():
    config = tiny_config(**FULL, training={"learning_rate": 3e-3, "vlm_learning_rate": 3e-4})
    policy, batch = PiStarRECAPPolicy(config), random_batch(config, 8, seed=0)
    start = evaluate(policy, batch)
    assert torch.equal(start.actions, start.unconditioned_actions)
    optimizer = policy.configure_optimizers()
    losses = []
    for _ in range(40):
        step = policy.training_step(batch, READY)
        optimizer.zero_grad()
        step["loss"].backward()
        optimizer.step()
        policy.update_targets()
        losses.append(step["policy_loss"].item())
    assert losses[-1] < 0.6 * losses[0]
    end = evaluate(policy, batch)
    assert (end.actions - end.unconditioned_actions).abs().amax(dim=(1, 2)).min() > 1e-3


def test_training_step_reports_means_over_what_is_valid():
    policy, batch = build(recap={"demo_weight": 1.0, "auto_weight": 1.0, "intervention_weight": 1.0})
    step = policy.training_step(batch)
    torch.testing.assert_close(step["loss"].detach(), step["policy_loss"] + step["q_loss"] + step["v_loss"])
    assert step["advantage"].shape == (8,)


def test_select_action_hands_out_a_chunk_and_reset_forgets_it():
    policy, batch = build()
    noise = batch.noise[:, 0]
    chunk = policy.predict_action_chunk(batch.observation, noise=noise)
    assert chunk.shape == (8, 4, 6)
    handed = [policy.select_action(batch.observation, noise=noise) for _ in range(6)]
    torch.testing.assert_close(torch.stack(handed[:4], dim=1), chunk)
    assert torch.equal(handed[4], handed[0])
    policy.reset()
    assert torch.equal(policy.select_action(batch.observation, noise=noise), handed[0])


def test_predicted_actions_use_the_mask_the_steps_and_no_dropout():
    policy, batch = build(model={"action_expert_dropout": 0.5})
    options = {"noise": batch.noise[:, 0], "action_dim_mask": batch.action_dim_mask}
    chunk = policy.predict_action_chunk(batch.observation, **options)
    assert torch.equal(chunk, policy.predict_action_chunk(batch.observation, **options))
    assert chunk[:, :, -1].eq(0).all()
    assert chunk[:, :, :-1].ne(0).all()
    assert policy.training
    assert not torch.equal(chunk, policy.predict_action_chunk(batch.observation, num_steps=1, **options))
    torch.testing.assert_close(chunk, evaluate(policy, batch).actions)
