"""The figures of hand-made records, against answers known beforehand."""

import json

import numpy as np
import pytest

from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.baseline import MeanActions
from recap_ds.evaluate.offline import action_errors, flat_metrics, summarise, value_figures
from recap_ds.evaluate.results import results_table
from recap_ds.train.gate import GATES
from tests.evaluate.hand_made import (
    CENTER,
    HORIZON,
    ROBOT_DIMS,
    SCALE,
    constant,
    make_records,
    normalised,
    normalizer,
)

CONSTANT = constant(np.arange(12.0).reshape(2, 3, 2))
TASKS = ["cube", "cup"]
EVERYTHING = np.ones(12, bool)


def summary_of(records, **recap) -> dict:
    return summarise(records, PiStarRECAPConfig(recap=recap), TASKS, normalizer(), CONSTANT)


# -- action errors ----------------------------------------------------------------------------------------------


def test_a_perfect_policy_has_no_error():
    records = make_records()
    errors = action_errors(records._replace(actions=records.true_actions), normalizer(), CONSTANT)
    assert errors.keys() == {"demo", "auto", "intervention", "demo_and_human", "all"}
    for figures in errors.values():
        assert figures["error"] == figures["ratio"] == figures["rmse"] == 0.0
        assert figures["constant_error"] > 0


def test_the_constant_policy_has_ratio_one():
    records = make_records()
    for names, group in ([["demo"], "demo"], [["demo", "intervention"], "demo_and_human"], [list(SOURCE_IDS), "all"]):
        chunk = CONSTANT.per_task(names)[records.task][:, None].repeat(HORIZON, axis=1)
        figures = action_errors(records._replace(actions=normalised(chunk)), normalizer(), CONSTANT)[group]
        # Samples went through float32 units of the model and back.
        assert figures["ratio"] == pytest.approx(1.0, rel=1e-5)
        assert figures["rmse"] == pytest.approx(figures["constant_rmse"], rel=1e-5)


def test_errors_are_in_robot_units_per_dim_and_frame():
    records = make_records()
    # Off by a tenth in model units everywhere; by 3 model units in frame 0 of dim 0.
    wrong = records.true_actions + 0.1
    wrong[:, 0, 0] = records.true_actions[:, 0, 0] + 3.0
    figures = action_errors(records._replace(actions=wrong), normalizer(), CONSTANT)["all"]
    frames = records.action_mask[:, :, 0].sum(axis=0)  # samples that have frame h
    first, others = frames[0], frames[1:].sum()
    in_dim_0 = (first * 3.0 + others * 0.1) / frames.sum() * SCALE[0]
    assert figures["error_by_dim"] == pytest.approx([in_dim_0, 0.1 * SCALE[1]], rel=1e-4)
    later = 0.1 * SCALE.mean()
    assert figures["error_by_frame"] == pytest.approx([(3.0 * SCALE[0] + 0.1 * SCALE[1]) / 2, later, later], rel=1e-4)
    assert figures["error"] == pytest.approx((in_dim_0 + 0.1 * SCALE[1]) / 2, rel=1e-4)
    squares = (first * (3.0 * SCALE[0]) ** 2 + others * (0.1 * SCALE[0]) ** 2) / frames.sum() + (0.1 * SCALE[1]) ** 2
    assert figures["rmse"] == pytest.approx(np.sqrt(squares / 2), rel=1e-4)
    assert figures["num_samples"] == 12


def test_padding_and_dims_the_robot_lacks_change_nothing():
    records = make_records()
    garbage = {
        name: np.where(records.action_mask, getattr(records, name), 1e6)
        for name in ("actions", "unconditioned_actions", "true_actions")
    }
    clean = summary_of(records)
    assert summary_of(records._replace(**garbage)) == clean
    # A frame that no sample has counts as nothing, not as NaN.
    mask = records.action_mask.copy()
    mask[:, -1] = False
    errors = action_errors(records._replace(action_mask=mask), normalizer(), CONSTANT)
    assert errors["all"]["error_by_frame"][-1] == 0.0 and np.isfinite(errors["all"]["error"])


def test_a_group_is_judged_by_its_own_samples_and_their_constant():
    records = make_records()
    keep = np.isin(records.source, [SOURCE_IDS["demo"], SOURCE_IDS["intervention"]])
    figures = action_errors(records, normalizer(), CONSTANT)["demo_and_human"]
    mean = (CONSTANT.mean[:, 0] + CONSTANT.mean[:, 2]) / 2
    total = count = 0.0
    for row in np.flatnonzero(keep):
        for frame in range(HORIZON):
            for dim in range(ROBOT_DIMS):
                if records.action_mask[row, frame, dim]:
                    true = records.true_actions[row, frame, dim] * SCALE[dim] + CENTER[dim]
                    total += abs(mean[records.task[row], dim] - true)
                    count += 1
    assert figures["constant_error"] == pytest.approx(total / count, rel=1e-5)
    assert figures["num_samples"] == keep.sum()


def test_absent_sources_have_no_group_and_a_still_robot_no_ratio():
    records = make_records(source=np.full(12, SOURCE_IDS["auto"]))
    assert action_errors(records, normalizer(), CONSTANT).keys() == {"auto", "all"}
    still = np.broadcast_to(normalised(CENTER), records.true_actions.shape)
    at_rest = MeanActions(np.broadcast_to(CENTER, (2, 3, 2)), np.ones((2, 3)))
    errors = action_errors(records._replace(true_actions=still, actions=still), normalizer(), at_rest)
    assert errors["auto"]["ratio"] is None and errors["auto"]["error"] == 0.0


def test_indicator_effect_is_the_distance_between_the_two_chunks():
    records = make_records()
    apart = records._replace(unconditioned_actions=records.actions - 0.5)
    figures = action_errors(apart, normalizer(), CONSTANT)["all"]
    assert figures["indicator_effect"] == pytest.approx(0.5 * SCALE.mean(), rel=1e-4)


# -- value figures ----------------------------------------------------------------------------------------------


def test_a_perfect_value_function():
    returns = -np.arange(12) / 12.0
    records = make_records(mc_return=returns, v=returns, outcome=np.where(returns > -0.5, 0, 1))
    figures = value_figures(records, EVERYTHING)
    assert figures["mae"] == 0.0 and figures["separation"] == 1.0
    assert figures["rank_correlation"] == pytest.approx(1.0)
    assert figures["shuffled_image_gap"] is None, "nothing can be relatively worse than no error"
    assert figures["constant_mae"] == pytest.approx(0.25)


def test_value_figures_by_hand():
    records = make_records(
        4,
        v=np.array([-0.1, -0.5, -0.3, -0.9]),
        mc_return=np.array([-0.2, -0.4, -0.4, -0.8]),
        v_shuffled=np.array([-0.5, -0.5, -0.5, -0.5]),
        outcome=np.array([OUTCOME_IDS[name] for name in ("success", "failure", "failure", "success")]),
    )
    figures = value_figures(records, np.ones(4, bool))
    assert figures["mae"] == pytest.approx(0.1)
    assert figures["constant_mae"] == pytest.approx(0.15)  # 0.2, 0, 0, 0.4 from the median of -0.4
    assert figures["shuffled_image_gap"] == pytest.approx((0.3 + 0.1 + 0.1 + 0.3) / 4 / 0.1 - 1)
    assert figures["separation"] == pytest.approx(2 / 4)  # -0.1 beats both failures, -0.9 none


def test_only_known_returns_count():
    records = make_records()
    known = np.arange(12) < 8
    lost = records._replace(mc_valid=known, mc_return=np.where(known, records.mc_return, np.nan))
    first = make_records()._replace(**{name: column[:8] for name, column in records._asdict().items()})
    assert value_figures(lost, EVERYTHING) == value_figures(first, np.ones(8, bool))
    nothing = value_figures(records._replace(mc_valid=np.zeros(12, bool)), EVERYTHING)
    assert nothing.pop("num_samples") == 0 and set(nothing.values()) == {None}


def test_a_timeout_whose_return_is_known_is_a_failure():
    outcome = np.where(np.arange(12) % 2, OUTCOME_IDS["success"], OUTCOME_IDS["truncated"])
    timeouts, failures = make_records(outcome=outcome), make_records()
    assert value_figures(timeouts, EVERYTHING) == value_figures(failures, EVERYTHING)


def test_a_sample_whose_lender_is_damaged_takes_no_part_in_the_gap():
    records = make_records()
    lent = np.arange(len(records.v)) % 3 > 0
    shuffled = np.where(lent, records.v_shuffled, np.nan)
    gap = value_figures(records._replace(v_shuffled=shuffled), EVERYTHING)["shuffled_image_gap"]
    assert gap == value_figures(records, lent)["shuffled_image_gap"] is not None
    blind = value_figures(records._replace(v_shuffled=np.full_like(shuffled, np.nan)), EVERYTHING)
    assert blind["shuffled_image_gap"] is None and blind["mae"] == value_figures(records, EVERYTHING)["mae"]


def test_a_value_function_that_does_not_look_has_no_gap():
    records = make_records()
    assert value_figures(records._replace(v_shuffled=records.v), EVERYTHING)["shuffled_image_gap"] == 0.0


# -- the summary ------------------------------------------------------------------------------------------------


def test_losses_are_means_over_valid_elements():
    records = make_records()
    result = summary_of(records, demo_weight=1.0, auto_weight=0.5, intervention_weight=2.0)
    elements, losses = records.action_mask.sum(axis=(1, 2)), records.flow_loss
    assert result["policy_loss"] == pytest.approx(np.average(losses[:, 2], weights=elements))
    assert result["v_loss"] == pytest.approx(records.v_loss[records.td_valid].mean())
    assert result["q_loss"] == pytest.approx(records.q_loss[records.td_valid].mean())
    weighted = losses[:, 2] * np.array([1.0, 0.5, 2.0])[records.source]
    policy = np.average(weighted, weights=elements)
    assert result["total_loss"] == pytest.approx(policy + result["v_loss"] + result["q_loss"])
    means = {
        name: np.average(losses[:, i], weights=elements) for i, name in enumerate(("none", "negative", "positive"))
    }
    assert {name: result["flow_loss"][name] for name in means} == pytest.approx(means)
    assert result["flow_loss"]["conditioning_gap"] == pytest.approx(means["negative"] / means["positive"] - 1)
    demo = records.source == 0
    by_source = np.average(losses[demo, 2], weights=elements[demo])
    assert result["flow_loss"]["by_source"]["demo"] == pytest.approx(by_source)


def test_a_policy_of_weighted_extraction_is_judged_without_an_indicator():
    records = make_records()
    result = summary_of(records, policy_extraction="weighted")
    assert result["policy_loss"] == pytest.approx(result["flow_loss"]["none"])
    free = action_errors(records._replace(actions=records.unconditioned_actions), normalizer(), CONSTANT)
    assert result["actions"] == free


def test_distributions_are_of_samples_with_a_td_target():
    records = make_records()
    result, td = summary_of(records), records.td_valid
    assert result["q_values"]["mean"] == pytest.approx(records.q[td].mean())
    advantage = (records.q - records.v)[td]
    assert result["advantages"]["std"] == pytest.approx(np.sqrt(((advantage - advantage.mean()) ** 2).mean()))
    assert result["v_values"]["p50"] == pytest.approx(np.median(records.v))
    assert result["num_samples"] == 12
    assert result["value"]["tasks"]["cup"] == {**value_figures(records, records.task == 1), "nll": None}
    bars = [part["counts"] for of_task in result["advantage_histograms"].values() for part in of_task.values()]
    assert sum(map(sum, bars)) == td.sum()
    assert sum(group["num_samples"] for group in result["value"]["all"]["calibration"]) == records.mc_valid.sum()


def test_figures_without_data_are_none_and_leave_no_metric():
    records = make_records(td_valid=np.zeros(12, bool), mc_valid=np.zeros(12, bool))
    result = summary_of(records)
    assert result["q_values"] is None and result["q_loss"] is None and result["total_loss"] > 0
    metrics = flat_metrics(result)
    assert "eval/q_loss" not in metrics and "eval/value_mae" not in metrics
    assert metrics["eval/loss"] == result["total_loss"]
    json.dumps(result, allow_nan=False)


def test_flat_metrics_are_numbers_with_the_names_of_training():
    metrics = flat_metrics(summary_of(make_records()))
    names = {"loss", "policy_loss", "q_loss", "v_loss", "conditioning_gap", "value_mae", "value_rank_correlation"}
    assert {f"eval/{name}" for name in names} <= metrics.keys()
    assert metrics.keys() >= {"eval/action_error/demo_and_human", "eval/action_error_ratio/all"}
    assert all(isinstance(number, float) for number in metrics.values())


# -- stages that have half of it --------------------------------------------------------------------------------

NO_POLICY = {"flow_loss": None, "actions": None, "unconditioned_actions": None}
NO_VALUES = {"q": None, "v": None, "v_shuffled": None, "q_loss": None, "v_loss": None}


def judged(records, **sections) -> dict:
    return summarise(records, PiStarRECAPConfig(**sections), TASKS, normalizer(), None)


def test_a_distributional_critic_is_judged_by_its_likelihoods():
    known = np.arange(12) % 3 != 0
    records = make_records(mc_valid=known, **NO_POLICY)._replace(q=None, q_loss=None)
    stage = {"training": {"stage": "critic"}, "value": {"critic": "distributional"}}
    result = judged(records, **stage)
    nll = records.v_loss[known].mean()
    assert result["total_loss"] == result["v_loss"] == result["value"]["all"]["nll"] == pytest.approx(nll)
    cup = records.v_loss[known & (records.task == 1)].mean()
    assert result["value"]["tasks"]["cup"]["nll"] == pytest.approx(cup)
    for name in ("policy_loss", "q_loss", "q_values", "advantages", "flow_loss", "actions"):
        assert result[name] is None, name
    metrics = flat_metrics(result)
    assert metrics["eval/loss"] == metrics["eval/value_nll"] == pytest.approx(nll)
    assert {gate.metric for gate in GATES.values()} <= metrics.keys()
    json.dumps(result, allow_nan=False)
    assert "value  cup " in results_table(result)


def test_an_iql_critic_alone_sums_its_two_losses():
    records = make_records(**NO_POLICY)
    weights = {"v_loss_weight": 0.5, "q_loss_weight": 2.0}
    result = judged(records, training={"stage": "critic"}, iql=weights)
    td = records.td_valid
    assert result["total_loss"] == pytest.approx(0.5 * records.v_loss[td].mean() + 2.0 * records.q_loss[td].mean())
    assert result["value"]["all"]["nll"] is None and "eval/value_nll" not in flat_metrics(result)


@pytest.mark.parametrize("recap", [{}, {"sft": True}])
def test_a_policy_alone_is_judged_by_its_actions(recap):
    records = make_records(**NO_VALUES)
    labels = {} if recap else {"labels": "mine"}
    config = PiStarRECAPConfig(training={"stage": "policy"}, recap=recap, data=labels)
    result = summarise(records, config, TASKS, normalizer(), CONSTANT)
    whole = summary_of(make_records())
    assert result["policy_loss"] == whole["policy_loss"] and result["actions"] == whole["actions"]
    assert result["value"] is None and result["v_values"] is None
    # Fine-tuning never saw the negative indicator: how it does with it says nothing.
    gap = None if recap else whole["flow_loss"]["conditioning_gap"]
    assert result["flow_loss"]["conditioning_gap"] == gap
    assert not any("value" in name for name in flat_metrics(result))
    assert not any(line.startswith("value") for line in results_table(result).splitlines())
