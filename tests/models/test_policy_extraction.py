"""Who is shown which indicator, and with what weight a sample trains the policy."""

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageScale
from recap_ds.batch import SOURCE_IDS
from tests.models.tiny_policy import READY, build, train

NONE, NEGATIVE, POSITIVE = (INDICATOR_IDS[name] for name in ("none", "negative", "positive"))


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


@pytest.mark.parametrize("extraction", ["conditioned", "weighted", "both"])
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
