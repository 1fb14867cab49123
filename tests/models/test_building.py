"""``fill``: every parameter exactly once, or an error that names the tensor."""

import pytest
import torch
from torch import nn

from recap_ds.models.building import Builder, fill


def tensors():
    return {"weight": torch.ones(2, 3), "bias": torch.full((2,), 7.0)}


def test_fill_writes_every_parameter_and_casts():
    module = nn.Linear(3, 2)
    fill(module, iter({name: value.double() for name, value in tensors().items()}.items()), Builder())
    assert module.weight.eq(1).all()
    assert module.bias.tolist() == [7.0, 7.0]
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "no tensor for 1 parameters, the first is 'bias'"),
        ({"extra": torch.ones(1)}, "tensor 'extra' has no place"),
        ({"bias": torch.ones(3)}, r"tensor 'bias' has shape \(3,\), the model needs \(2,\)"),
    ],
)
def test_fill_refuses_what_does_not_fit(change, message):
    values = {name: value for name, value in {**tensors(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        fill(nn.Linear(3, 2), iter(values.items()), Builder())


def test_fill_refuses_a_tensor_given_twice():
    with pytest.raises(ValueError, match="'weight' appears twice"):
        fill(nn.Linear(3, 2), iter([*tensors().items(), ("weight", torch.ones(2, 3))]), Builder())


def test_copy_makes_modules_equal():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    Builder().copy(source, target)
    assert torch.equal(source.weight, target.weight)
    assert source.weight.data_ptr() != target.weight.data_ptr()
