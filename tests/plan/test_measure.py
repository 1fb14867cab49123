"""Activations and operations on the meta device against the same accounting of a real step, and closed forms."""

import pytest
import torch
from torch import nn

from recap_ds.batch import map_tensors
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.plan.blank import blank_batch
from recap_ds.plan.measure import (
    build_on_meta,
    count_model_flops,
    measure_evaluation_on_meta,
    measure_on_meta,
    measure_step,
)
from recap_ds.plan.meter import SavedTensors, StepMeter, fused_attention
from tests.models.test_own_backbone import CONFIGS, build, own_config, save
from tests.models.tiny_policy import FROZEN, FULL, LORA, READY
from tests.tiny import random_batch, tiny_config

NUM_CAMERAS = 2


def step_config(kind, checkpointing, **training):
    model = {**kind.get("model", {}), "image_size": 64}
    training = {"batch_size": 8, "activation_checkpointing": checkpointing, **training}
    return tiny_config(**{**kind, "model": model}, training=training)


def measure_both(config, dtype):
    planned = measure_on_meta(build_on_meta(config, dtype, None), NUM_CAMERAS)
    batch = random_batch(config, config.training.batch_size, seed=0)
    real = PiStarRECAPPolicy(config).to(dtype)
    return planned, measure_step(real, batch, READY, normalizers(local_counts(batch)))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", [FULL, LORA, FROZEN], ids=["full", "lora", "frozen"])
def test_the_step_planned_holds_what_a_real_one_does(kind, checkpointing):
    planned, real = measure_both(step_config(kind, checkpointing), torch.bfloat16)
    assert planned.saved_bytes == pytest.approx(real.saved_bytes, rel=0.05)
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
    assert planned.flops == pytest.approx(real.flops, rel=0.1)  # torch counts no attention on a CPU
    assert planned.visits == real.visits


@pytest.mark.parametrize(
    ("stage", "sections"),
    [("critic", {}), ("critic", {"value": {"critic": "distributional"}}), ("policy", {"recap": {"sft": True}})],
    ids=["critic", "distributional", "policy"],
)
def test_other_stages_are_measured_too(stage, sections):
    config = step_config({**FULL, **sections}, False, stage=stage)
    planned = measure_on_meta(build_on_meta(config, torch.float32, None), NUM_CAMERAS)
    assert 0 < planned.saved_bytes < planned.peak_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_critics_own_vlm_is_measured_too(name, tmp_path):
    config = own_config(save(build(name), tmp_path / name))
    policy = build_on_meta(config, torch.bfloat16, config.value.vlm_model_name)
    assert measure_on_meta(policy, NUM_CAMERAS).flops > 0


def test_checkpointing_trades_operations_for_memory():
    kept, recomputed = (
        measure_on_meta(build_on_meta(step_config(FULL, flag), torch.bfloat16, None), NUM_CAMERAS)
        for flag in (False, True)
    )
    assert recomputed.saved_bytes < 0.5 * kept.saved_bytes
    assert recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.flops > 1.1 * kept.flops
    assert count_model_flops(step_config(FULL, True), torch.bfloat16, None, NUM_CAMERAS) == kept.flops


def test_a_frozen_vlm_spares_its_backward():
    frozen, lora, full = (
        count_model_flops(step_config(kind, False), torch.bfloat16, None, NUM_CAMERAS) for kind in (FROZEN, LORA, FULL)
    )
    assert frozen < lora < full


def test_evaluation_is_measured_at_its_own_batch_size():
    policy = build_on_meta(step_config(FULL, False), torch.float32, None)
    small, large = (measure_evaluation_on_meta(policy, batch_size, NUM_CAMERAS) for batch_size in (32, 64))
    assert large == pytest.approx(2 * small, rel=0.1)


def test_action_tokens_are_measured_too():
    model = {"action_expert": "pi_joint", "action_expert_num_heads": 4, "stop_gradient": True}
    kind = {"data": {"normalization": "quantile"}, **LORA}
    learning = {**kind, "model": {**model, "action_token_weight": 1.0, "max_action_tokens": 8}}
    planned, real = measure_both(step_config(learning, True), torch.bfloat16)
    assert planned.saved_bytes == pytest.approx(real.saved_bytes, rel=0.05)
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
    assert planned.visits == real.visits
    plain = measure_on_meta(build_on_meta(step_config({**kind, "model": model}, True), torch.bfloat16, None), 2)
    assert planned.flops > plain.flops and len(planned.visits) > len(plain.visits)


@pytest.mark.parametrize("num_action_tokens", [0, 8])
def test_a_blank_batch_has_the_shapes_of_a_real_one(num_action_tokens):
    learning = {"action_expert": "pi_joint", "action_token_weight": float(num_action_tokens), "max_action_tokens": 8}
    config = tiny_config(model=learning, **LORA, data={"normalization": "quantile"})
    assert config.num_action_tokens == num_action_tokens
    shapes = [
        [(tuple(part.shape), part.dtype) for part in leaves(batch)]
        for batch in (blank_batch(config, 8, NUM_CAMERAS), random_batch(config, 8, seed=0, num_cameras=NUM_CAMERAS))
    ]
    assert shapes[0] == shapes[1]


def leaves(batch):
    found = []
    map_tensors(found.append, batch)
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_meter_counts_a_linear_layer(device):
    layer, x = nn.Linear(30, 20, bias=False, device=device), torch.empty(10, 30, device=device, requires_grad=True)
    meter, saved = StepMeter(outside=[*layer.parameters(), x]), SavedTensors(outside=layer.parameters())
    with meter:
        with saved.watch():
            out = layer(x)
        assert saved.num_bytes == 4 * 10 * 30  # its input
        assert meter.live_bytes == 4 * 10 * 20  # its output
        out.view(-1).unsqueeze(0)  # views cost nothing
        assert meter.live_bytes == 4 * 10 * 20
        torch.autograd.grad(out, (layer.weight, x), torch.empty_like(out))
    assert meter.flops == 3 * 2 * 10 * 20 * 30  # forward, and backward to weight and to input
    assert meter.peak_bytes == 4 * (2 * 10 * 20 + 20 * 30 + 10 * 30)
    assert meter.live_bytes == 4 * 10 * 20  # gradients are gone
    del out
    assert meter.live_bytes == 0


def test_attention_on_meta_keeps_no_scores():
    query = torch.empty(2, 3, 50, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.empty(2, 1, 1, 50, device="meta", dtype=torch.bool)
    saved = SavedTensors(outside=[])
    with fused_attention(), saved.watch():
        out = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert out.shape == query.shape
    scores = 2 * 2 * 3 * 50 * 50
    assert saved.num_bytes < scores + 3 * query.numel() * 2
    assert nn.functional.scaled_dot_product_attention.__module__ != "recap_ds.plan.meter"


def test_grouped_queries_share_keys():
    query = torch.empty(2, 4, 8, 16, device="meta")
    key = torch.empty(2, 1, 8, 16, device="meta")
    with fused_attention():
        assert nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True).shape == query.shape
