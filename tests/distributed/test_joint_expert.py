"""What the joint attention of pi0 / pi0.5 cannot do elsewhere: train sharded, adapted, recomputed and insulated."""

import pytest

from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def ranks():
    return run_ranks("joint_expert_worker", 2)


@pytest.mark.parametrize("case", ["pi05 text", "pi05 insulated", "pi05 tokens", "pi0"])
def test_sharded_gradients_are_those_of_one_dense_process(ranks, case):
    for rank in ranks:
        result = rank[case]
        assert result["same_parameters"]
        assert result["largest_difference"] < 1e-5 * result["largest_gradient"]
        assert result["vlm"] > 1e-4 and result["expert_from_actions"] > 1e-3


def test_insulated_the_actions_move_nothing_of_the_vlm(ranks):
    for rank in ranks:
        assert rank["pi05 insulated"]["vlm_from_actions"] == 0.0
        assert rank["pi05 text"]["vlm_from_actions"] > 1e-4
