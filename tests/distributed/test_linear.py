import inspect

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch.nn import functional

from recap_ds.distributed.linear import linear_is, replace_linear, sharded_linear


def made(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_linear_layer_and_so_are_its_gradients(shape, with_bias):
    x, weight, bias = made(*shape).requires_grad_(), made(4, 7).requires_grad_(), made(4).requires_grad_()
    leaves = (x, weight, bias) if with_bias else (x, weight)
    expected, y = functional.linear(*leaves), sharded_linear(*leaves)
    assert torch.equal(y, expected)
    seed = made(*y.shape)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, seed), torch.autograd.grad(expected, leaves, seed), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_it_keeps_the_parameter_itself_and_the_input_only_for_a_weight_that_trains(frozen):
    x, weight = made(3, 7).requires_grad_(), nn.Parameter(made(4, 7), requires_grad=not frozen)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sharded_linear(x, weight)
    assert [any(tensor is one for tensor in kept) for one in (weight, x)] == [True, not frozen]
    assert len(kept) == (1 if frozen else 2)


@pytest.mark.parametrize("before, after", [(zero3_linear_wrap, sharded_linear), (functional.linear, functional.linear)])
def test_only_what_deepspeed_put_in_is_replaced(before, after):
    with linear_is(before):
        replace_linear()
        assert functional.linear is after


def test_deepspeeds_own_is_still_what_this_replaces():
    """Its bias is added in a second pass and its Function asks for a context: else distributed.linear may go."""
    assert "output += bias" in inspect.getsource(zero3_linear_wrap.__globals__["LinearFunctionForZeroStage3"].forward)
