"""StepMetrics against sums computed again sample by sample, and what it leaves out."""

import math

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.iql import MAX_EXTRACTION_WEIGHT
from recap_ds.batch import SOURCE_IDS
from recap_ds.models.losses import TrainOutput
from recap_ds.train.metrics import StepMetrics
from tests.tiny import random_batch, tiny_config
from tests.train.made_outputs import expected_means, made_output

TASKS = ["cube", "cup"]
CPU = torch.device("cpu")


def step_of(config, num_micro_batches: int = 3, seed: int = 0):
    batches = [random_batch(config, 8, seed=seed + number) for number in range(num_micro_batches)]
    return batches, [made_output(config, batch, seed + number) for number, batch in enumerate(batches)]


def summarised(config, batches, outputs) -> dict[str, float]:
    """Every micro-batch in one applied step."""
    metrics = StepMetrics(config, TASKS, CPU)
    for batch, output in zip(batches, outputs, strict=True):
        metrics.add(batch, output)
    metrics.end_step(applied=True)
    return metrics.summarise(batches[-1], outputs[-1])


@pytest.mark.parametrize("demos", ["positive", "labelled"])
def test_sums_over_micro_batches_and_steps_equal_a_plain_computation(demos):
    config = tiny_config(recap={"demos": demos})
    batches, outputs = step_of(config)
    expected = expected_means(config, batches, outputs, TASKS)
    metrics = StepMetrics(config, TASKS, CPU)
    for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
        metrics.add(batch, output)
        if number != 1:  # a step of two micro-batches, and one of one
            metrics.end_step(applied=True)
    found = metrics.summarise(batches[-1], outputs[-1])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert {f"train/{name}/samples": found[f"train/{name}/samples"] for name in SOURCE_IDS} == {
        "train/demo/samples": 9.0,
        "train/auto/samples": 9.0,
        "train/intervention/samples": 6.0,
    }


def test_a_summary_starts_again():
    config = tiny_config()
    batches, outputs = step_of(config)
    metrics = StepMetrics(config, TASKS, CPU)
    lines = []
    for _ in range(2):
        metrics.add(batches[0], outputs[0])
        metrics.end_step(applied=True)
        lines.append(metrics.summarise(batches[0], outputs[0]))
    assert lines[0] == lines[1]


def test_a_skipped_step_leaves_no_nan_but_counts_its_replacements():
    config = tiny_config()
    batches, outputs = step_of(config)
    expected = summarised(config, batches[:1], outputs[:1])
    replaced = torch.tensor([True, True, *[False] * 6])
    bad = outputs[1]._replace(loss=torch.tensor(math.nan), v_loss=torch.full((8,), math.inf))
    metrics = StepMetrics(config, TASKS, CPU)
    metrics.add(batches[0], outputs[0])
    metrics.end_step(applied=True)
    metrics.add(batches[1]._replace(replaced=replaced), bad)
    metrics.end_step(applied=False)
    found = metrics.summarise(batches[0], outputs[0])
    assert found == expected | {"data/replaced_samples": 2.0}


def test_where_every_step_was_skipped_a_loss_is_unknown_and_not_zero():
    config = tiny_config()
    batches, outputs = step_of(config)
    metrics = StepMetrics(config, TASKS, CPU)
    metrics.add(batches[0], outputs[0])
    metrics.end_step(applied=False)
    found = metrics.summarise(batches[0], outputs[0])
    assert all(math.isnan(found[f"train/{name}"]) for name in ("loss", "policy_loss", "q_loss", "v_loss"))
    assert found["data/replaced_samples"] == 0.0


def test_a_source_without_samples_has_a_count_and_nothing_else():
    config = tiny_config()
    batch = random_batch(config, 8, seed=0)
    batch = batch._replace(source=torch.full((8,), SOURCE_IDS["auto"]))
    found = summarised(config, [batch], [made_output(config, batch, 0)])
    for name in ("demo", "intervention"):
        assert {key: value for key, value in found.items() if f"/{name}/" in key} == {f"train/{name}/samples": 0.0}
    assert found["train/auto/policy_loss"] == pytest.approx(found["train/policy_loss"])
    assert all(math.isfinite(value) for value in found.values())


def test_the_positive_fraction_ignores_forced_and_dropped_samples():
    config = tiny_config()
    batch = random_batch(config, 8, seed=0)
    none, negative, positive = (INDICATOR_IDS[name] for name in ("none", "negative", "positive"))
    auto = SOURCE_IDS["auto"]
    batch = batch._replace(
        source=torch.tensor([auto, auto, auto, auto, auto, 0, 2, 2]),
        task=torch.tensor([0, 0, 0, 0, 1, 0, 0, 1]),
    )
    indicator = torch.tensor([positive, negative, negative, none, none, positive, positive, none])
    found = summarised(config, [batch], [made_output(config, batch, 0)._replace(indicator=indicator)])
    assert found["train/positive_fraction/cube"] == pytest.approx(1 / 3)
    assert "train/positive_fraction/cup" not in found, "its only free sample was dropped"
    assert found["train/forced_fraction/cube"] == pytest.approx(2 / 6)
    assert found["train/forced_fraction/cup"] == pytest.approx(1 / 2)


def test_corrections_that_were_labelled_are_not_counted_as_forced():
    config = tiny_config()
    batch = random_batch(config, 8, seed=0)
    batch = batch._replace(source=torch.tensor([1, 1, 1, 1, 0, 0, 2, 2]), task=torch.zeros(8, dtype=torch.int64))
    output = made_output(config, batch, 0)._replace(indicator=torch.full((8,), INDICATOR_IDS["positive"]))
    output.indicator[6] = INDICATOR_IDS["negative"]
    metrics = StepMetrics(config, TASKS, CPU, corrections="labelled")
    metrics.add(batch, output)
    metrics.end_step(applied=True)
    found = metrics.summarise(batch, output)
    assert found["train/positive_fraction/cube"] == pytest.approx(5 / 6)
    assert found["train/forced_fraction/cube"] == pytest.approx(2 / 8)


def test_the_clip_fraction_counts_weights_at_the_limit_of_their_source():
    config = tiny_config(recap={"demo_weight": 0.0, "auto_weight": 0.5, "intervention_weight": 2.0})
    batch = random_batch(config, 8, seed=0)
    extraction = torch.tensor([100.0, 100.0, 100.0, 1.0, 99.0, 100.0, 1.0, 100.0])
    weight = extraction * torch.tensor(config.recap.source_weights)[batch.source]
    found = summarised(config, [batch], [made_output(config, batch, 0)._replace(weight=weight)])
    # Rows 1, 2, 5 and 7 are at the limit; row 0, a demo, is as well, but its source weighs nothing.
    assert MAX_EXTRACTION_WEIGHT == 100.0
    assert found["train/weight_clip_fraction"] == pytest.approx(4 / 8)


def test_distributions_are_of_the_last_micro_batch_where_a_target_exists():
    config = tiny_config()
    batches, outputs = step_of(config)
    broken = outputs[-1].q.clone()
    broken[0] = math.nan
    outputs[-1] = outputs[-1]._replace(q=broken)
    found = summarised(config, batches, outputs)
    td = batches[-1].td_valid.numpy()
    assert not td[-1]
    for name, column in (("q", broken), ("v", outputs[-1].v), ("advantage", outputs[-1].advantage)):
        held = column.numpy()[td].astype(np.float64)
        held = held[np.isfinite(held)]
        assert found[f"train/{name}/mean"] == pytest.approx(held.mean())
        assert found[f"train/{name}/std"] == pytest.approx(held.std())
        for key, level in (("p05", 5), ("p50", 50), ("p95", 95)):
            assert found[f"train/{name}/{key}"] == pytest.approx(np.percentile(held, level))


def test_a_batch_without_any_target_has_no_distributions():
    config = tiny_config()
    batch = random_batch(config, 8, seed=0)._replace(td_valid=torch.zeros(8, dtype=torch.bool))
    found = summarised(config, [batch], [made_output(config, batch, 0)])
    assert not [name for name in found if name.startswith(("train/q/", "train/v/", "train/advantage/"))]
    assert math.isnan(found["train/q_loss"]) and math.isfinite(found["train/policy_loss"])


def test_a_stage_logs_what_it_has():
    """A critic's figures count known returns; a policy's are those of joint without the critics'."""
    stage = {"training": {"stage": "critic"}, "value": {"critic": "distributional"}}
    config = tiny_config(**stage)
    batch = random_batch(config, 8, seed=0)
    whole = made_output(config, batch, seed=0)
    known = batch.mc_valid.float()
    output = TrainOutput(whole.loss, v_loss=whole.v_loss * known, v=whole.v, value_error=whole.target_gap * known)
    found = summarised(config, [batch], [output])
    assert found["train/v_loss"] == pytest.approx((whole.v_loss * known).sum().item() / known.sum().item())
    assert found["train/value_mae"] == pytest.approx((whole.target_gap * known).sum().item() / known.sum().item())
    assert found["train/v/mean"] == pytest.approx(whole.v[batch.mc_valid].mean().item())
    absent = ("q_loss", "policy_loss", "policy_weight", "td_error", "target_gap", "positive", "indicator", "forced")
    assert not [name for name in found if any(part in name for part in absent)]

    labels = {"training": {"stage": "policy"}, "data": {"labels": "mine"}}
    policy = TrainOutput(
        whole.loss, policy_loss=whole.policy_loss, weight=whole.weight, indicator=batch.label_indicator
    )
    found = summarised(tiny_config(**labels), [batch], [policy])
    expected = expected_means(config, [batch], [whole._replace(indicator=batch.label_indicator)], TASKS)
    kept = {name: value for name, value in expected.items() if "q_loss" not in name and "v_loss" not in name}
    kept = {name: value for name, value in kept.items() if name not in ("train/target_gap", "train/td_error")}
    assert {name: found[name] for name in kept} == pytest.approx(kept)
    absent = ("q_loss", "v_loss", "advantage", "action_token")
    assert not [name for name in found if any(part in name for part in absent)]


def test_action_tokens_count_each_and_not_each_sample():
    config = tiny_config(
        model={"action_expert": "pi_joint", "action_token_weight": 1.0, "max_action_tokens": 9},
        lora={"enabled": True},
        data={"normalization": "quantile"},
    )
    batches, outputs = step_of(config, num_micro_batches=2)
    loss, accuracy = torch.linspace(1.0, 3.0, 8), torch.linspace(0.2, 0.9, 8)
    outputs = [output._replace(action_token_loss=loss, action_token_accuracy=accuracy) for output in outputs]
    found = summarised(config, batches, outputs)
    counts = sum(batch.action_token_mask.sum(dim=1) for batch in batches)
    demo = torch.arange(8) % 3 == 0
    for name, values in (("loss", loss), ("accuracy", accuracy)):
        for place, chosen in (("", slice(None)), ("demo/", demo)):
            expected = (values * counts)[chosen].sum().item() / counts[chosen].sum().item()
            assert found[f"train/{place}action_token_{name}"] == pytest.approx(expected)
