"""One training forward: who gets gradient, how losses are normalised and weighted, who is shown which indicator."""

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageScale
from recap_ds.batch import SOURCE_IDS, Observation, map_tensors
from recap_ds.models.losses import count_flow_elements, local_counts, normalizers
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.tiny import random_batch, tiny_config, wake

FROZEN, FULL = {"model": {"freeze_vlm": True}}, {"model": {"freeze_vlm": False}}
LORA = {"lora": {"enabled": True, "rank": 4}}
EXTRACTIONS = ("conditioned", "weighted", "both")
NONE, NEGATIVE, POSITIVE = (INDICATOR_IDS[name] for name in ("none", "negative", "positive"))
READY = AdvantageScale(torch.tensor([0.0, 0.01]), torch.tensor([0.05, 0.1]), torch.tensor([True, True]))


def build(**overrides):
    config = tiny_config(**overrides)
    policy = PiStarRECAPPolicy(config)
    wake(policy)
    return policy, random_batch(config, 8, seed=0)


def train(policy, batch, scale=READY, counts=None, warming_up=False):
    counts = local_counts(batch) if counts is None else counts
    return policy(batch, "train", scale, normalizers(counts), warming_up)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def rows(batch, part):
    return map_tensors(lambda tensor: tensor[part], batch)


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
    assert (counts[0] != counts[1]).all()
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


def expected_indicator(batch, advantage, scale, demos="positive", known=True):
    """Sample by sample, in words of the paper."""
    chosen = []
    for i in range(len(advantage)):
        source = int(batch.source[i])
        if batch.indicator_dropped[i]:
            chosen.append(NONE)
        elif source == SOURCE_IDS["intervention"] or (source == SOURCE_IDS["demo"] and demos == "positive"):
            chosen.append(POSITIVE)
        elif not (known and scale.ready[batch.task[i]] and batch.td_valid[i]):
            chosen.append(NONE)
        else:
            chosen.append(POSITIVE if advantage[i] > scale.threshold[batch.task[i]] else NEGATIVE)
    return chosen


@pytest.mark.parametrize("demos", ["positive", "labelled"])
def test_indicators_of_a_ready_scale(demos):
    policy, batch = build(recap={"demos": demos})
    advantage = train(policy, batch).advantage
    middle = advantage.median().expand(2)  # some above, some not
    scale = READY._replace(threshold=middle)
    indicator = train(policy, batch, scale).indicator.tolist()
    assert indicator == expected_indicator(batch, advantage, scale, demos)
    assert set(indicator) == {NONE, NEGATIVE, POSITIVE} if demos == "labelled" else POSITIVE in indicator


def test_corrections_are_positive_and_dropped_ones_carry_nothing():
    policy, batch = build()
    kept = batch._replace(
        source=torch.full_like(batch.source, SOURCE_IDS["intervention"]),
        indicator_dropped=torch.zeros_like(batch.indicator_dropped),
    )
    never = READY._replace(threshold=torch.full((2,), torch.inf))
    assert train(policy, kept, never).indicator.tolist() == [POSITIVE] * 8
    dropped = kept._replace(indicator_dropped=torch.ones_like(batch.indicator_dropped))
    assert train(policy, dropped, never).indicator.tolist() == [NONE] * 8


def test_warm_up_and_a_scale_that_is_not_ready_give_no_indicator_and_weight_one():
    policy, batch = build(recap={"policy_extraction": "both"})
    infinite = torch.full((2,), torch.inf)
    waiting = AdvantageScale(infinite, infinite, torch.tensor([False, False]))
    for out in (train(policy, batch, READY, warming_up=True), train(policy, batch, waiting)):
        assert out.indicator.tolist() == expected_indicator(batch, out.advantage, waiting)
        assert out.weight.tolist() == [1.0, 1.0, 2.0] * 2 + [1.0, 1.0]


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_weights_equal_hand_computed_ones(extraction):
    recap = {"policy_extraction": extraction, "demo_weight": 0.5, "auto_weight": 1.5, "intervention_weight": 3.0}
    policy, batch = build(recap=recap, iql={"temperature": 0.5})
    out = train(policy, batch)
    for i in range(8):
        weight = {0: 0.5, 1: 1.5, 2: 3.0}[int(batch.source[i])]
        if extraction != "conditioned" and batch.td_valid[i]:
            sigma = READY.sigma[batch.task[i]]
            weight *= min(float(torch.exp(out.advantage[i].double() / (0.5 * sigma))), 100.0)
        assert out.weight[i].item() == pytest.approx(weight, rel=1e-5)
    assert (out.indicator == NONE).all() == (extraction == "weighted")


def test_the_indicator_reaches_the_policy_and_never_the_critics():
    policy, batch = build()
    shown = train(policy, batch._replace(indicator_dropped=torch.zeros_like(batch.indicator_dropped)))
    hidden = train(policy, batch._replace(indicator_dropped=torch.ones_like(batch.indicator_dropped)))
    assert (shown.indicator != hidden.indicator).any()
    assert not torch.equal(shown.policy_loss, hidden.policy_loss)
    for name in ("q", "v", "advantage", "q_loss", "v_loss", "td_error"):
        assert torch.equal(getattr(shown, name), getattr(hidden, name)), name


def test_training_outputs_are_detached_but_for_the_loss():
    policy, batch = build(**FULL)
    out = train(policy, batch)
    assert [name for name, value in zip(out._fields, out, strict=True) if value.requires_grad] == ["loss"]


def test_bfloat16_weights_give_float32_losses_and_values():
    policy, batch = build(**FULL)
    exact = train(policy, batch)
    out = train(policy.bfloat16(), batch)
    assert {value.dtype for name, value in zip(out._fields, out, strict=True) if name != "indicator"} == {torch.float32}
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
