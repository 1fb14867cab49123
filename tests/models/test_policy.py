"""One training forward: who gets gradient, how losses are normalised, and what may not change them."""

import pytest
import torch

from recap_ds.batch import Observation
from recap_ds.models.losses import count_flow_elements, local_counts, normalizers
from recap_ds.models.pixels import to_pixels
from tests.models.tiny_policy import FROZEN, FULL, LORA, READY, build, gradients, rows, train
from tests.tiny import random_batch, tiny_config

EXTRACTIONS = ("conditioned", "weighted", "both")


@pytest.mark.parametrize("extraction", EXTRACTIONS)
@pytest.mark.parametrize("variant", [FROZEN, LORA, FULL], ids=["frozen", "lora", "full"])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(variant, extraction):
    policy, batch = build(**variant, recap={"policy_extraction": extraction})
    policy.training_step(batch)["loss"].backward()
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in policy.named_parameters() if p.grad is not None}
    # A bias added to every key shifts no softmax: those gradients are rounding.
    flat = [name for name in trainable if not dict(policy.named_parameters())[name].grad.any()]
    assert [name for name in flat if "key.bias" not in name and "k_proj.bias" not in name] == []
    assert ("vlm" in {name.split(".")[0] for name in trainable}) == policy.vlm.trainable


@pytest.mark.parametrize("variant", [FROZEN, LORA, FULL], ids=["frozen", "lora", "full"])
def test_the_optimizer_holds_every_trainable_parameter_once(variant):
    policy, _ = build(**variant, training={"learning_rate": 3e-4, "vlm_learning_rate": 2e-5})
    groups = {group["name"]: group for group in policy.configure_optimizers().param_groups}
    assert list(groups) == (["vlm"] if policy.vlm.trainable else []) + ["action_expert", "critic"]
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in policy.parameters() if p.requires_grad)
    rates = {"vlm": 2e-5, "action_expert": 3e-4, "critic": 3e-4}
    assert all(group["lr"] == rates[name] for name, group in groups.items())


def test_losses_of_critic_and_policy_keep_to_their_modules():
    policy, batch = build(**FULL)
    no_actions = batch._replace(action_valid=torch.zeros_like(batch.action_valid))
    reached = {name.split(".")[0] for name, g in gradients(policy, train(policy, no_actions).loss).items() if g.any()}
    assert reached == {"critic"}
    no_targets = batch._replace(td_valid=torch.zeros_like(batch.td_valid))
    reached = {name.split(".")[0] for name, g in gradients(policy, train(policy, no_targets).loss).items() if g.any()}
    assert reached == {"vlm", "action_expert"}


def test_a_step_without_any_valid_element_is_zero_not_nan():
    policy, batch = build(recap={"policy_extraction": "weighted", "intervention_weight": 1e4})
    nothing = batch._replace(
        action_valid=torch.zeros_like(batch.action_valid), td_valid=torch.zeros_like(batch.td_valid)
    )
    output = train(policy, nothing)
    assert output.loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(policy, output.loss).values())


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_the_loss_is_the_weighted_sum_over_the_steps_counts(extraction):
    weights = {"policy_loss_weight": 0.7, "q_loss_weight": 1.3, "v_loss_weight": 0.4}
    policy, batch = build(iql=weights, recap={"policy_extraction": extraction})
    out = train(policy, batch)
    num_elements = sum(
        int(batch.action_valid[i].sum()) * int(batch.action_dim_mask[i].sum()) * batch.time.shape[1] for i in range(8)
    )
    assert count_flow_elements(batch).sum() == num_elements
    flow = (out.weight * out.policy_loss * count_flow_elements(batch)).sum() / num_elements
    td = (0.4 * out.v_loss + 1.3 * out.q_loss).sum() / 7
    torch.testing.assert_close(out.loss.detach(), 0.7 * flow + td)


def test_two_micro_batches_with_the_mean_counts_equal_one_batch():
    policy, batch = build(**FULL)
    whole = train(policy, batch)
    expected = gradients(policy, whole.loss)
    halves = [rows(batch, slice(0, 4)), rows(batch, slice(4, 8))]
    counts = torch.stack([local_counts(half) for half in halves])
    assert (counts[0] != counts[1])[counts.sum(dim=0) > 0].all()  # all but those of action tokens, which it has not
    losses = [train(policy, half, counts=counts.mean(dim=0)).loss for half in halves]
    torch.testing.assert_close(torch.stack(losses).mean(), whole.loss)
    both = [gradients(policy, train(policy, half, counts=counts.mean(dim=0)).loss) for half in halves]
    for name, gradient in expected.items():
        torch.testing.assert_close((both[0][name] + both[1][name]) / 2, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_without_actions_and_target_contributes_nothing():
    policy, batch = build(**FULL)
    silent = torch.tensor([False, True] * 4)
    padded = batch._replace(
        action_valid=batch.action_valid & ~silent[:, None],
        td_valid=batch.td_valid & ~silent,
        sample_valid=~silent,
    )
    alone = train(policy, rows(batch, ~silent))
    expected = gradients(policy, alone.loss)
    out = train(policy, padded)
    torch.testing.assert_close(out.loss, alone.loss)
    for name, gradient in gradients(policy, out.loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def dirty_where_masked(batch):
    """Other contents in everything a mask calls absent."""
    noise = random_batch(tiny_config(), len(batch.task), seed=1)
    observation = batch.observation
    real = batch.action_valid[:, :, None] & batch.action_dim_mask[:, None, :]
    return batch._replace(
        observation=observation._replace(
            images=torch.where(
                observation.camera_mask[:, :, None, None, None], observation.images, noise.observation.images
            ),
            tokens=torch.where(observation.token_mask, observation.tokens, noise.observation.tokens),
        ),
        actions=torch.where(real, batch.actions, torch.nan),
        noise=torch.where(real[:, None], batch.noise, noise.noise),
        next_observation=Observation(
            *(
                torch.where(batch.continues.bool().view(-1, *[1] * (part.dim() - 1)), part, other)
                for part, other in zip(batch.next_observation, noise.next_observation, strict=True)
            )
        ),
    )


def test_padding_changes_no_output_and_no_gradient():
    policy, batch = build(**FULL)
    clean, dirty = train(policy, batch), train(policy, dirty_where_masked(batch))
    for name, value, other in zip(clean._fields, clean, dirty, strict=True):
        torch.testing.assert_close(value, other, msg=name)
    expected = gradients(policy, clean.loss)
    for name, gradient in gradients(policy, dirty.loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_policy_loss_is_the_velocity_error_of_real_actions():
    policy, batch = build()
    out, now = train(policy, batch), batch.observation
    expert = policy.action_expert
    with torch.no_grad():
        context = expert.encode_prefix(policy.vlm(now, to_pixels(now.images)))
        time = batch.time[:, :, None, None]  # 1 is noise
        noise = batch.noise * batch.action_dim_mask[:, None, None, :]
        x_t = time * noise + (1.0 - time) * batch.actions[:, None]
        indicator = out.indicator[:, None].expand(-1, 2)
        field = expert(context, now.state, x_t, batch.time, indicator, batch.action_valid)
    for i in range(8):
        frames, dims = int(batch.action_valid[i].sum()), int(batch.action_dim_mask[i].sum())
        error = (field[i] - (noise[i] - batch.actions[i]))[:, :frames, :dims].square().mean()
        torch.testing.assert_close(out.policy_loss[i], error)


def test_critic_losses_equal_the_equations_on_the_networks_outputs():
    policy, batch = build()
    with torch.no_grad():  # a target that lags behind, values that vary
        for module in (policy.critic, policy.target_critic):
            for parameter in module.parameters():
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
                )
        policy.target_critic.heads[0].output.bias.add_(0.2)
        now, later = batch.observation, batch.next_observation
        prefix, next_prefix = (policy.vlm(seen, to_pixels(seen.images)) for seen in (now, later))
        shown = (prefix, now.state, batch.actions, batch.td_action_valid)
        q, slow = policy.critic.q(*shown), policy.target_critic(*shown).amin(dim=0)
        v, next_v = policy.critic.v(prefix, now.state), policy.critic.v(next_prefix, later.state)
    out = train(policy, batch)
    torch.testing.assert_close(out.q, slow)
    torch.testing.assert_close(out.v, v)
    torch.testing.assert_close(out.advantage, slow - v)
    ends = 0
    for i in range(7):
        bootstrap = float(batch.chunk_discount[i] * next_v[i]) if batch.continues[i] else 0.0
        ends += not batch.continues[i]
        target = min(max(float(batch.chunk_reward[i]) + bootstrap, -1.0), 0.0)
        assert out.q_loss[i].item() == pytest.approx(sum((float(head[i]) - target) ** 2 for head in q), rel=1e-4)
        error = float(slow[i] - v[i])
        assert out.v_loss[i].item() == pytest.approx((0.7 if error > 0 else 0.3) * error**2, rel=1e-3)
        assert out.td_error[i].item() == pytest.approx(float(q[:, i].mean()) - target, rel=1e-4)
    assert 0 < ends < 7


def test_the_last_row_without_target_still_trains_the_policy():
    policy, batch = build()
    assert not batch.td_valid[7]
    out = train(policy, batch)
    assert out.policy_loss[7] > 0
    assert out.q_loss[7] == out.v_loss[7] == out.td_error[7] == 0


def test_training_outputs_are_detached_but_for_the_loss():
    policy, batch = build(**FULL)
    out = train(policy, batch)
    given = {name: value for name, value in out._asdict().items() if value is not None}
    assert [name for name, value in given.items() if value.requires_grad] == ["loss"]


def test_bfloat16_weights_give_float32_losses_and_values():
    policy, batch = build(**FULL)
    exact = train(policy, batch)
    out = train(policy.bfloat16(), batch)
    given = {name: value for name, value in out._asdict().items() if value is not None}
    assert {value.dtype for name, value in given.items() if name != "indicator"} == {torch.float32}
    torch.testing.assert_close(out.v, exact.v, atol=0.02, rtol=0)
    torch.testing.assert_close(out.loss, exact.loss, atol=0, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(policy, out.loss).values())


@pytest.mark.parametrize("variant", [FROZEN, FULL], ids=["frozen", "full"])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(variant):
    expected, batch = build(**variant)
    policy, _ = build(**variant, training={"activation_checkpointing": True})
    found, kept = [], []
    for p in (expected, policy):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(_count(packed), lambda tensor: tensor):
            loss = train(p, batch).loss
        found.append(gradients(p, loss))
        kept.append(sum(packed))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert kept[1] < 0.7 * kept[0]


def _count(packed):
    def pack(tensor):
        packed.append(tensor.numel())
        return tensor

    return pack


def test_augmentation_moves_both_observations_alike():
    policy, batch = build(data={"augmentation": "shift_and_color"})
    plain, _ = build()
    draws = torch.full_like(batch.augmentation, 0.5)
    draws[:, 1] = 1.0  # two of 32 pixels to the left

    def moved(seen):
        columns = (torch.arange(32) + 2).clamp(max=31)
        return seen._replace(images=seen.images[..., columns])

    shifted = batch._replace(observation=moved(batch.observation), next_observation=moved(batch.next_observation))
    out, expected = train(policy, batch._replace(augmentation=draws)), train(plain, shifted)
    for name, value, other in zip(out._fields, out, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4, msg=name)


def test_augmentation_is_for_training_alone():
    policy, batch = build(data={"augmentation": "shift_and_color"})
    plain, _ = build()
    assert not torch.equal(train(policy, batch).v, train(plain, batch).v)
    identity = batch._replace(augmentation=torch.full_like(batch.augmentation, 0.5))
    torch.testing.assert_close(train(policy, identity).v, train(plain, batch).v)
    evaluated = (p(batch, "evaluate", READY, normalizers(local_counts(batch)), False) for p in (policy, plain))
    torch.testing.assert_close(*(out.v for out in evaluated))
    torch.testing.assert_close(train(policy.eval(), batch).v, train(plain.eval(), batch).v)
