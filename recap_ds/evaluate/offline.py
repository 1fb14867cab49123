"""Held-out evaluation, second half: per-sample records -> the figures people judge a run by.

Action errors are in the robot's own units, open loop: the sampled chunk against the recorded one. Their yardstick is
the best constant: the task's mean action over training samples of the same sources. Value figures compare V with the
Monte-Carlo return.

    N samples   H chunk   A action dims
"""

from typing import Any

import numpy as np

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.baseline import MeanActions
from recap_ds.evaluate.distributions import calibration, histograms_by_task
from recap_ds.evaluate.records import Records
from recap_ds.evaluate.statistics import rank_correlation, separation
from recap_ds.processing.normalize import Normalizer

# The value figures that training logs.
VALUE_FIGURES = ("nll", "mae", "rank_correlation", "separation", "shuffled_image_gap")


def summarise(
    records: Records,
    config: PiStarRECAPConfig,
    tasks: list[str],
    normalizer: Normalizer,
    constant: MeanActions | None,
) -> dict[str, Any]:
    """The ``dataset_evaluation`` of evaluation_results.json; None where a figure has no data or the stage has no such.

    ``constant`` is needed where there are actions.
    """
    records, acting_loss = _acting(records, config)
    td = records.td_valid
    v_valid = records.mc_valid if config.value.critic == "distributional" else td
    v_loss, q_loss = _mean_of(records.v_loss, v_valid), _mean_of(records.q_loss, td)
    has_q = records.q is not None
    return {
        "total_loss": _total_loss(records, config, acting_loss, v_loss, q_loss),
        "v_loss": v_loss,
        "q_loss": q_loss,
        "policy_loss": None if acting_loss is None else _flow_mean(records, acting_loss),
        "q_values": _distribution(records.q[td]) if has_q else None,
        "v_values": _distribution(records.v) if records.v is not None else None,
        "advantages": _distribution((records.q - records.v)[td]) if has_q else None,
        "advantage_histograms": histograms_by_task(
            (records.q - records.v)[td], records.task[td], records.source[td], tasks
        )
        if has_q
        else None,
        "num_samples": len(records.task),
        "flow_loss": None if acting_loss is None else _flow_losses(records, config, acting_loss),
        "actions": None if acting_loss is None else action_errors(records, normalizer, constant),
        "value": None if records.v is None else _values(records, config, tasks),
    }


def _acting(records: Records, config: PiStarRECAPConfig) -> tuple[Records, np.ndarray | None]:
    """Records with the actions of the policy as it acts, and its flow loss [N]; None where the stage has no policy."""
    if records.flow_loss is None:
        return records, None
    if config.recap.policy_extraction != "weighted":
        return records, records.flow_loss[:, INDICATOR_IDS["positive"]]
    # Such a policy never sees an indicator in training: its positive row says nothing and is not what acts.
    return records._replace(actions=records.unconditioned_actions), records.flow_loss[:, INDICATOR_IDS["none"]]


def _total_loss(
    records: Records,
    config: PiStarRECAPConfig,
    acting_loss: np.ndarray | None,
    v_loss: float | None,
    q_loss: float | None,
) -> float | None:
    """With the weights of training, so that it is comparable with train/loss (weighted extraction aside)."""
    iql = config.iql
    if config.value.critic == "distributional" and acting_loss is None:
        return v_loss
    critic_loss = iql.v_loss_weight * (v_loss or 0.0) + iql.q_loss_weight * (q_loss or 0.0)
    if acting_loss is None:
        return critic_loss if v_loss is not None else None
    source_weight = np.array(config.recap.source_weights)[records.source]
    policy_loss = _flow_mean(records, source_weight * acting_loss)
    return None if policy_loss is None else iql.policy_loss_weight * policy_loss + critic_loss


def flat_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The few figures that training logs, as eval/... metrics."""
    metrics = {
        "eval/loss": summary["total_loss"],
        "eval/policy_loss": summary["policy_loss"],
        "eval/q_loss": summary["q_loss"],
        "eval/v_loss": summary["v_loss"],
    }
    if summary["flow_loss"] is not None:
        metrics["eval/conditioning_gap"] = summary["flow_loss"]["conditioning_gap"]
    if summary["value"] is not None:
        metrics |= {f"eval/value_{name}": summary["value"]["all"][name] for name in VALUE_FIGURES}
    if (errors := summary["actions"]) is not None:
        metrics |= {f"eval/action_error/{group}": figures["error"] for group, figures in errors.items()}
        metrics |= {f"eval/action_error_ratio/{group}": figures["ratio"] for group, figures in errors.items()}
    return {name: number for name, number in metrics.items() if number is not None}


def _flow_losses(records: Records, config: PiStarRECAPConfig, acting_loss: np.ndarray) -> dict[str, Any]:
    """By indicator; the gap is how much worse the opposite indicator predicts what was done, in relative terms."""
    means = {name: _flow_mean(records, records.flow_loss[:, index]) for name, index in INDICATOR_IDS.items()}
    sources = {name: _flow_mean(records, acting_loss, records.source == index) for name, index in SOURCE_IDS.items()}
    # Supervised fine-tuning never shows the negative indicator: there is nothing to compare with.
    comparable = means["positive"] and not config.recap.sft
    gap = means["negative"] / means["positive"] - 1.0 if comparable else None
    return {**means, "conditioning_gap": gap, "by_source": sources}


def _flow_mean(records: Records, values: np.ndarray, keep: np.ndarray | None = None) -> float | None:
    """Mean of per-sample ``values`` [N] over valid action elements, as the training loss: a short chunk counts less."""
    elements = records.action_mask.sum(axis=(1, 2))
    if keep is not None:
        elements = elements * keep
    return float((values * elements).sum() / elements.sum()) if elements.any() else None


def action_errors(records: Records, normalizer: Normalizer, constant: MeanActions) -> dict[str, Any]:
    """Mean absolute open-loop error per group of sources, with the best constant's and their ratio.

    ``demo_and_human`` joins demonstrations with human-controlled frames: what a policy can be expected to predict
    (the noise of autonomous actions cannot be).
    """
    groups = {name: [name] for name in SOURCE_IDS}
    groups |= {"demo_and_human": ["demo", "intervention"], "all": list(SOURCE_IDS)}
    errors = {}
    for group, names in groups.items():
        keep = np.isin(records.source, [SOURCE_IDS[name] for name in names])
        if keep.any():
            errors[group] = _action_error(records, keep, normalizer, constant.per_task(names))
    return errors


def _action_error(records: Records, keep: np.ndarray, normalizer: Normalizer, constant: np.ndarray) -> dict[str, Any]:
    """``constant`` [K, A]: the action of the constant policy, per task."""
    true, sampled, free = (
        normalizer.actions.unnormalize(values[keep].astype(np.float32)).astype(np.float64)
        for values in (records.true_actions, records.actions, records.unconditioned_actions)
    )
    mask = records.action_mask[keep][:, :, : true.shape[-1]]
    error = np.abs(sampled - true)
    baseline = np.abs(constant[records.task[keep]][:, None] - true)
    mean_error, mean_baseline = _masked_mean(error, mask), _masked_mean(baseline, mask)
    rmse, baseline_rmse = (np.sqrt(_masked_mean(values**2, mask)) for values in (error, baseline))
    return {
        "error": float(mean_error),
        "constant_error": float(mean_baseline),
        "ratio": float(mean_error / mean_baseline) if mean_baseline > 0 else None,
        "rmse": float(rmse),
        "constant_rmse": float(baseline_rmse),
        "error_by_dim": _masked_mean(error, mask, axis=(0, 1)).tolist(),
        "error_by_frame": _masked_mean(error, mask, axis=(0, 2)).tolist(),
        # Does the indicator reach the action: mean distance between conditioned and unconditioned chunks.
        "indicator_effect": float(_masked_mean(np.abs(sampled - free), mask)),
        "num_samples": int(keep.sum()),
    }


def _values(records: Records, config: PiStarRECAPConfig, tasks: list[str]) -> dict[str, Any]:
    """``value_figures`` over all samples and per task; with the likelihood of the return where V is a distribution."""

    def figures(keep: np.ndarray) -> dict[str, Any]:
        distributional = config.value.critic == "distributional"
        nll = _mean_of(records.v_loss, keep & records.mc_valid) if distributional else None
        return {**value_figures(records, keep), "nll": nll}

    return {
        "all": figures(np.ones(len(records.task), bool)),
        "tasks": {name: figures(records.task == index) for index, name in enumerate(tasks)},
    }


def value_figures(records: Records, keep: np.ndarray) -> dict[str, Any]:
    """How V orders and measures the samples of ``keep`` [N] against their Monte-Carlo returns."""
    keep = keep & records.mc_valid
    v, returns, shuffled = records.v[keep], records.mc_return[keep], records.v_shuffled[keep]
    # A known return means that the task ended: what is no success here is a failure, or a timeout that counts as one.
    success = records.outcome[keep] == OUTCOME_IDS["success"]
    mae = _mean(np.abs(v - returns))
    return {
        "num_samples": int(keep.sum()),
        "mae": mae,
        "constant_mae": _mean(np.abs(returns - np.median(returns))) if len(returns) else None,
        "rank_correlation": rank_correlation(v, returns),
        "separation": separation(v[success], v[~success]),
        "shuffled_image_gap": _shuffled_image_gap(np.abs(v - returns), np.abs(shuffled - returns)),
        "calibration": calibration(v, returns),
    }


def _shuffled_image_gap(error: np.ndarray, shuffled_error: np.ndarray) -> float | None:
    """How much worse V does with the images of another episode of the task; about 0 means it does not look."""
    lent = ~np.isnan(shuffled_error)
    mae = _mean(error[lent])
    return _mean(shuffled_error[lent]) / mae - 1.0 if mae else None


def _distribution(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
    return {"mean": float(values.mean()), "std": float(values.std()), "p05": low, "p50": middle, "p95": high}


def _mean_of(values: np.ndarray | None, keep: np.ndarray) -> float | None:
    return None if values is None else _mean(values[keep])


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _masked_mean(values: np.ndarray, mask: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Mean where ``mask``; 0 where nothing is."""
    return (values * mask).sum(axis=axis) / np.maximum(mask.sum(axis=axis), 1)
