"""Guided sampling: its ends bit for bit, one pass against two, and one encoding of the prefix."""

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.models.dit_cross import DiTCrossExpert
from recap_ds.models.sampling import sample_actions
from recap_ds.models.vlm import PrefixFeatures
from tests.tiny import tiny_config, wake

BATCH, PREFIX_WIDTH, NUM_STEPS = 3, 16, 4
CONFIG = tiny_config()


@pytest.fixture
def expert():
    torch.manual_seed(0)
    expert = DiTCrossExpert(CONFIG.model, PREFIX_WIDTH, CONFIG.max_state_dim, CONFIG.max_action_dim).eval()
    wake(expert)
    return expert


def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    prefix = PrefixFeatures(torch.randn(BATCH, 5, PREFIX_WIDTH, generator=generator), mask)
    state = torch.randn(BATCH, CONFIG.max_state_dim, generator=generator)
    noise = torch.randn(BATCH, CONFIG.chunk_size, CONFIG.max_action_dim, generator=generator)
    action_dims = (torch.arange(CONFIG.max_action_dim) < 4).expand(BATCH, -1)
    return prefix, state, noise, action_dims


@torch.no_grad()
def sample(expert, advantage, guidance_beta):
    return sample_actions(expert, *inputs(), advantage, guidance_beta, NUM_STEPS)


@torch.no_grad()
def by_hand(expert, advantage, guidance_beta):
    """Two expert calls per step, each with its own projection of the prefix."""
    prefix, state, noise, action_dims = inputs()
    x, step = noise * action_dims[:, None], 1.0 / NUM_STEPS
    valid = torch.ones(BATCH, CONFIG.chunk_size, dtype=torch.bool)
    for i in range(NUM_STEPS):
        branches = []
        for name in ("none", advantage):
            time = torch.full((BATCH, 1), 1.0 - i * step)
            indicator = torch.full((BATCH, 1), INDICATOR_IDS[name])
            branches.append(expert(expert.encode_prefix(prefix), state, x[:, None], time, indicator, valid)[:, 0])
        field = (1.0 - guidance_beta) * branches[0] + guidance_beta * branches[1]
        x = x - step * field * action_dims[:, None]
    return x


@pytest.mark.parametrize("advantage", ["positive", "negative"])
@pytest.mark.parametrize("guidance_beta", [0.0, 1.0, 2.5])
def test_guidance_in_one_pass_equals_two(expert, advantage, guidance_beta):
    expected = by_hand(expert, advantage, guidance_beta)
    torch.testing.assert_close(sample(expert, advantage, guidance_beta), expected, atol=1e-5, rtol=1e-5)


def test_the_ends_of_guidance_are_the_branches_bit_for_bit(expert):
    assert torch.equal(sample(expert, "positive", 0.0), sample(expert, None, 1.0))
    assert torch.equal(sample(expert, None, 3.0), sample(expert, None, 1.0))
    passes = []
    expert.register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    sample(expert, "positive", 1.0)
    sample(expert, "positive", 0.0)
    assert passes == [1] * 2 * NUM_STEPS  # the other branch is not even computed


@torch.no_grad()
def test_every_row_may_have_its_own_guidance(expert):
    told = ((None, 3.0), ("negative", 1.0), ("positive", 2.5))
    together = sample_actions(expert, *inputs(), [each[0] for each in told], [each[1] for each in told], NUM_STEPS)
    for row, (advantage, guidance_beta) in enumerate(told):
        alone = sample(expert, advantage, guidance_beta)[row]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_rows_without_guidance_need_no_second_branch(expert):
    passes = []
    expert.register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    sample(expert, ["positive", None, "negative"], [1.0, 2.0, 0.0])
    assert passes == [1] * NUM_STEPS


def test_the_branches_differ(expert):
    none, negative, positive = (sample(expert, advantage, 1.0) for advantage in (None, "negative", "positive"))
    assert not torch.allclose(none, positive, atol=1e-3)
    assert not torch.allclose(negative, positive, atol=1e-3)


def test_the_prefix_is_projected_once_for_all_steps_and_branches(expert):
    projections = []
    for projection in expert.projections:
        projection.register_forward_hook(lambda module, args, output: projections.append(1))
    sample(expert, "positive", 2.0)
    assert len(projections) == len(expert.projections)


def test_dims_the_robot_lacks_stay_zero(expert):
    for guidance_beta in (1.0, 2.0):
        actions = sample(expert, "positive", guidance_beta)
        assert actions[..., 4:].eq(0).all()
        assert actions[..., :4].ne(0).all()
