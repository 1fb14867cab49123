"""Target networks and the moving average against a dense fp32 reference, on two ranks."""

from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.tiny import WIDTH

CONFIGS = (
    "zero3",
    "zero3 not persistent",
    "zero3 bf16",
    "offload",
    "zero2",
    "zero2 bf16",
    "hpz",
    "hpz bf16",
    "hpz not persistent",
)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("shadow_worker", 2)


@pytest.mark.parametrize("config", CONFIGS)
def test_target_follows_the_dense_average_and_the_forward_uses_it(ranks, config):
    for rank in ranks:
        polyak = rank["polyak"][config]
        assert polyak["starts_equal"]
        assert polyak["moved"] > 1e-3, "the online critic has to differ from its average for this to mean anything"
        assert polyak["error"] < 1e-7
        assert polyak["forward_uses_the_average"] == 0.0
    num_elements = sum(rank["polyak"][config]["num_tile_elements"] for rank in ranks)
    assert num_elements == 3 * WIDTH + 3, "the tiles of all ranks cover the critic once"


@pytest.mark.parametrize("config", CONFIGS)
def test_swapping_the_average_in_and_out_leaves_no_trace(ranks, config):
    for rank in ranks:
        assert rank["swap"][config] == {"trace_untouched": True, "identical": True, "differs": True}
