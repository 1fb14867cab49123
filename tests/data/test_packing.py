from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from recap_ds.data.packing import SMALL_BYTES, pack, unpack


class Inner(NamedTuple):
    flags: Tensor
    nothing: Tensor


class Outer(NamedTuple):
    large: Tensor
    inner: Inner
    number: Tensor


def test_what_arrives_equals_what_was_sent_and_large_tensors_are_not_copied(monkeypatch):
    sent = Outer(
        torch.arange(SMALL_BYTES + 1, dtype=torch.uint8),
        Inner(torch.tensor([[True, False, True]]).T.expand(3, 2).contiguous(), torch.empty(4, 0, 3)),
        torch.tensor([2**62, -1]),
    )
    packed = pack(sent)
    assert packed.batch.large is sent.large and packed.small.nbytes < 300
    # torch's loader rebuilds what it pins, and makes lists of tuples without names. Nothing here can really pin.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, device=None: tensor)
    for got in (unpack(packed), unpack(pin_memory(packed))):
        for mine, its in zip((got.large, *got.inner, got.number), (sent.large, *sent.inner, sent.number), strict=True):
            assert mine.dtype == its.dtype and mine.shape == its.shape and mine.is_contiguous()
            assert torch.equal(mine, its)
