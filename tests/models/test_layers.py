"""Attention with masks, position features and learned queries, against sums written out."""

import math

import torch

from recap_ds.models.layers import AttentionPool, ZeroLinear, attend, sincos_embedding, split_heads


def heads(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_a_softmax_over_the_keys_that_may_be_seen():
    query, key, value = heads(1, 1, 2, 4, seed=0), heads(1, 1, 3, 4, seed=1), heads(1, 1, 3, 4, seed=2)
    mask = torch.tensor([[True, False, True]])
    seen = mask[0].nonzero()[:, 0]
    weights = (query[0, 0] @ key[0, 0, seen].T / math.sqrt(4)).softmax(dim=-1)
    torch.testing.assert_close(attend(query, key, value, mask)[0], weights @ value[0, 0, seen])


def test_attention_over_nothing_is_zero_with_a_finite_gradient():
    query = heads(2, 2, 1, 4, seed=0).requires_grad_()
    key = heads(2, 2, 3, 4, seed=1)
    mask = torch.tensor([[False] * 3, [True] * 3])
    out = attend(query, key, key, mask)
    out.sum().backward()
    assert out[0].eq(0).all()
    assert out[1].ne(0).all()
    assert query.grad.isfinite().all()


def test_heads_are_contiguous_slices_of_the_width():
    x = heads(2, 3, 8, seed=0)
    assert torch.equal(split_heads(x, 2)[:, 1], x[..., 4:])


def test_position_features_have_the_periods_asked_for():
    features = sincos_embedding(torch.tensor([0.0, 0.25, 1.0]), 4, min_period=1.0, max_period=4.0)
    half = math.pi / 2
    expected = [
        [math.sin(t * 4 * half), math.sin(t * half), math.cos(t * 4 * half), math.cos(t * half)] for t in (0, 0.25, 1)
    ]
    torch.testing.assert_close(features, torch.tensor(expected), atol=1e-6, rtol=0)


def test_position_features_are_openpis_at_half_time():
    features = sincos_embedding(torch.tensor([0.5]), 8, min_period=4e-3, max_period=4.0)
    expected = torch.tensor([[0.0, 0.0, 1.0, 0.7071, 1.0, -1.0, 0.0, 0.7071]])
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=0)


def test_a_pool_ignores_masked_context():
    torch.manual_seed(0)
    pool = AttentionPool(context_width=6, width=8, num_heads=2)
    context, mask = heads(2, 4, 6, seed=1), torch.tensor([[True, True, False, False]] * 2)
    short = pool(context[:, :2], mask[:, :2])
    assert short.shape == (2, 8)
    torch.testing.assert_close(pool(context, mask), short)


def test_a_zero_linear_starts_at_zero_whatever_built_it():
    assert ZeroLinear(3, 2)(torch.ones(1, 3)).tolist() == [[0.0, 0.0]]
