"""Which evaluation is the best, and when there has been nothing better for too long."""

import math

import pytest

from recap_ds.train.gate import GATES, GateState
from tests.tiny import tiny_config


def config_of(gate="loss", patience=None):
    stage = {} if gate == "loss" else {"value": {"critic": "distributional"}}
    training = {"stage": "critic" if stage else "joint", "early_stop_evaluations": patience}
    return tiny_config(evaluation={"gate": gate}, training=training, **stage)


def test_best_is_the_lowest_finite_loss():
    config, state = config_of(), GateState()
    losses = [math.nan, 3.0, 3.0, math.inf, 2.5, math.nan, 2.6, -math.inf, 2.0]
    assert [state.judge(config, {"eval/loss": loss}) for loss in losses] == [
        False, True, False, False, True, False, False, False, True,
    ]  # fmt: skip
    assert state == GateState("loss", 2.0, 0)


@pytest.mark.parametrize("name", [name for name in GATES if name != "loss"])
def test_every_gate_has_its_direction(name):
    config, state, metric = config_of(name), GateState(), GATES[name].metric
    better, worse = (0.1, 0.9) if name in ("nll", "mae") else (0.9, 0.1)
    assert state.judge(config, {metric: 0.5})
    assert not state.judge(config, {metric: worse})
    assert state.judge(config, {metric: better})
    assert state == GateState(name, better, 0)


def test_patience_counts_evaluations_without_a_better_one():
    config, state = config_of(patience=2), GateState()
    given_up = []
    for loss in (3.0, 4.0, 2.0, 2.0, math.nan):
        state.judge(config, {"eval/loss": loss})
        given_up.append(state.gives_up(config))
    assert given_up == [False, False, False, False, True]
    assert not state.gives_up(config_of()), "without patience nothing stops"


def test_a_figure_that_cannot_be_had_is_neither_best_nor_counted():
    config, state = config_of("separation", patience=1), GateState()
    for _ in range(3):
        assert not state.judge(config, {"eval/loss": 1.0})
    assert not state.gives_up(config)


def test_another_gate_begins_anew():
    state = GateState("loss", 0.1, 5)
    config = config_of("rank_correlation", patience=3)
    assert not state.gives_up(config), "what another gate counted is not this one's"
    assert state.judge(config, {GATES["rank_correlation"].metric: 0.05})
    assert state == GateState("rank_correlation", 0.05, 0)
