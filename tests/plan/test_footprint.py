"""The arithmetic of memory against what two ranks of real engines hold."""

import pytest
import torch

from recap_ds.distributed.footprint import ParameterSize, engine_bytes
from recap_ds.distributed.gathering import gather_totals
from recap_ds.errors import UsageError
from recap_ds.plan.estimate import averages_bytes
from recap_ds.plan.sizing import Sizer
from tests.distributed.harness import run_ranks
from tests.plan.engines import ENGINES, resolved, worker_config

WORLD, NUM_CAMERAS = 2, 2


@pytest.fixture(scope="module")
def ranks():
    return run_ranks("plan.plan_worker", WORLD)


@pytest.fixture(scope="module")
def sizers():
    return {dtype: Sizer(worker_config(), dtype, None, NUM_CAMERAS) for dtype in (torch.bfloat16, torch.float32)}


def sizer_of(name, sizers):
    return sizers[torch.bfloat16 if ENGINES[name][1] else torch.float32]


@pytest.mark.parametrize("name", ENGINES)
def test_the_bytes_of_an_engine_are_those_it_holds(name, ranks, sizers):
    planned = engine_bytes(sizer_of(name, sizers).parameters, resolved(name, worker_config(), WORLD), WORLD)
    for rank in ranks:
        held = rank[name]
        assert planned.weights == held["weights"]
        assert planned.standing_bucket == held["standing_bucket"]
        assert planned.persistent == pytest.approx(held["persistent"], rel=1e-3)
        assert planned.secondary == pytest.approx(held["secondary"], rel=0.01)
        if name == "zero3_offload":
            assert planned.host == held["gradients"] + held["optimizer"] + held["master_gradients"]
            assert planned.gradients == planned.optimizer == 0
        else:
            assert (planned.gradients, planned.optimizer) == (held["gradients"], held["optimizer"])


@pytest.mark.parametrize("name", ENGINES)
def test_the_averages_are_those_kept_beside_the_masters(name, ranks, sizers):
    planned = averages_bytes(sizer_of(name, sizers), worker_config(), WORLD)
    held = sum(rank[name]["averages"] for rank in ranks) / WORLD  # under ZeRO-2 one rank has more, another less
    assert planned == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "zero2"])
def test_gathered_parameters_follow_the_coordinator(name, ranks, sizers):
    sizer, zero = sizer_of(name, sizers), resolved(name, worker_config(), WORLD)["zero_optimization"]
    training = worker_config().training
    visits = sizer.measure(training.batch_size, training.activation_checkpointing, sharded=True).visits
    totals = gather_totals([p.numel for p in sizer.parameters], visits, zero, WORLD)
    for rank in ranks:
        assert totals.peak_whole == rank[name]["gathered_elements"]
    assert totals.peak_whole <= totals.peak_held <= 2 * totals.peak_whole


ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 5,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
}


def test_without_prefetch_and_reuse_one_parameter_is_there_at_a_time():
    totals = gather_totals([100, 40, 5], [[0], [1], [2], [1], [0]], ZERO, world=4)
    assert totals == (100, 100, 280)  # the last, of 5 elements, stays gathered and counts elsewhere


def test_what_is_used_again_soon_is_kept_and_not_gathered_twice():
    totals = gather_totals([100, 40], [[0], [1], [1], [0]], {**ZERO, "stage3_max_reuse_distance": 1000}, world=4)
    assert totals == (140, 140, 140)


def test_what_comes_together_is_there_twice_while_it_is_copied():
    assert gather_totals([100, 40], [[0, 1]], ZERO, world=4) == (140, 280, 140)


def test_one_rank_gathers_nothing():
    assert gather_totals([100, 40], [[0, 1]], ZERO, world=1) == (0, 0, 0)


def ds(**sections):
    zero = {**ZERO, "reduce_bucket_size": 10, "sub_group_size": 100}
    return {"bf16": {"enabled": True}, "zero_optimization": zero, **sections}


def test_shards_are_padded_one_by_one():
    sizes = [ParameterSize("a", 10, "vlm"), ParameterSize("b", 7, "vlm"), ParameterSize("c", 9, None)]
    found = engine_bytes(sizes, ds(), world=4)
    assert found.weights == 2 * (3 + 2 + 3)
    assert found.optimizer == 12 * (3 + 2)
    assert found.gradients == 2 * (3 + 2)  # bf16, as nothing says fp32
    assert engine_bytes(sizes, ds(data_types={"grad_accum_dtype": "fp32"}), world=4).gradients == 4 * (3 + 2)


def test_the_step_holds_the_gradients_of_the_largest_sub_group():
    sizes = [ParameterSize(name, 60, "vlm") for name in "abc"] + [ParameterSize("d", 90, "critic")]
    assert engine_bytes(sizes, ds(), world=1).step == 4 * 120  # a and b reach 100; c is alone, and so is d


def test_an_unknown_data_type_is_refused():
    with pytest.raises(UsageError, match="'fp8' is not a data type; there are fp32"):
        engine_bytes([ParameterSize("a", 10, "vlm")], ds(data_types={"grad_accum_dtype": "fp8"}), world=4)
