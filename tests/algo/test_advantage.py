"""The advantage ring against plain Python queues and numpy, and the table of indicators."""

from collections import deque

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS, AdvantageRing, AdvantageScale, choose_indicator, forced_positive
from recap_ds.batch import SOURCE_IDS

NONE, NEGATIVE, POSITIVE = INDICATOR_IDS["none"], INDICATOR_IDS["negative"], INDICATOR_IDS["positive"]


def step(generator, num, num_tasks, first_slot):
    """One optimizer step's samples, in an order that is not slot order."""
    order = torch.randperm(num, generator=generator)
    advantage = torch.randn(num, generator=generator)
    task = torch.randint(num_tasks, (num,), generator=generator)
    eligible = torch.rand(num, generator=generator) < 0.7
    return advantage[order], task[order], eligible[order], (torch.arange(num) + first_slot)[order]


def fill(ring, advantages, task=0):
    """Append to one task, in order."""
    advantage = torch.tensor(advantages, dtype=torch.float32)
    ones = torch.ones(len(advantages), dtype=torch.bool)
    ring.append(advantage, torch.full((len(advantages),), task), ones, torch.arange(len(advantages)))


@pytest.mark.parametrize("step_size", [3, 16, 200])  # below, about and far above the window
def test_ring_remembers_what_a_queue_in_slot_order_would(step_size):
    generator, num_tasks, window = torch.Generator().manual_seed(step_size), 3, 16
    ring, queues = AdvantageRing(num_tasks, window, "cpu"), [deque(maxlen=window) for _ in range(num_tasks)]
    counts = [0] * num_tasks
    for number in range(12):
        advantage, task, eligible, slot = step(generator, step_size, num_tasks, number * step_size)
        ring.append(advantage, task, eligible, slot)
        for row in slot.argsort().tolist():
            if eligible[row]:
                queues[task[row]].append(advantage[row].item())
                counts[task[row]] += 1
    state = ring.state_dict()
    assert state["counts"].tolist() == counts
    for values, queue, count in zip(state["values"], queues, counts, strict=True):
        # The oldest of a full ring stands where the next one goes.
        in_order = values.roll(-(count % window)) if count >= window else values[:count]
        assert in_order.tolist() == list(queue)


def test_ring_does_not_depend_on_the_order_of_rows():
    generator = torch.Generator().manual_seed(1)
    samples = step(generator, 100, 2, 0)
    shuffled = torch.randperm(100, generator=generator)
    one, other = AdvantageRing(2, 8, "cpu"), AdvantageRing(2, 8, "cpu")
    one.append(*samples)
    other.append(*(column[shuffled] for column in samples))
    assert torch.equal(one.state_dict()["values"], other.state_dict()["values"])


@pytest.mark.parametrize("num", [2, 7, 31, 32, 45])  # 32 fills the window, 45 has wrapped around
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.4, 0.5, 0.999])
def test_threshold_leaves_exactly_the_wanted_number_above(num, fraction):
    advantages = np.random.default_rng(num).normal(size=num).astype(np.float32)
    ring = AdvantageRing(2, 32, "cpu")
    fill(ring, advantages, task=1)
    held = advantages[-32:]
    scale = ring.scale(fraction, minimum=2)
    threshold = scale.threshold[1].numpy()
    assert int((held > threshold).sum()) == round(fraction * len(held))
    assert threshold in held or threshold == -np.inf
    np.testing.assert_allclose(scale.sigma[1], held.astype(np.float64).std(), rtol=1e-6)
    assert scale.ready.tolist() == [False, True]


def test_ties_at_the_threshold_are_not_positive():
    ring = AdvantageRing(1, 8, "cpu")
    fill(ring, [0.0, 0.05, 0.05, 0.05, 0.1])  # the reference episode: two of five wanted, one is strictly best
    scale = ring.scale(0.4, minimum=2)
    assert scale.threshold.item() == np.float32(0.05)
    above = torch.tensor([0.0, 0.05, 0.1]) > scale.threshold
    assert above.tolist() == [False, False, True]


def test_thresholds_follow_their_own_task():
    ring = AdvantageRing(2, 8, "cpu")
    fill(ring, [-0.4, -0.3, -0.2, -0.1], task=0)
    fill(ring, [0.1, 0.2, 0.3, 0.4], task=1)
    scale = ring.scale(0.5, minimum=2)
    torch.testing.assert_close(scale.threshold, torch.tensor([-0.3, 0.2]))


def test_scale_is_neutral_until_ready_and_sigma_has_a_floor():
    ring = AdvantageRing(2, 8, "cpu")
    fill(ring, [0.1, 0.2, 0.3], task=0)
    fill(ring, [0.1] * 4, task=1)
    scale = ring.scale(0.4, minimum=4)
    assert scale.ready.tolist() == [False, True]
    assert scale.threshold[0].item() == scale.sigma[0].item() == float("inf")
    assert scale.sigma[1].item() == pytest.approx(1e-6)


def test_ring_continues_from_its_state():
    generator = torch.Generator().manual_seed(2)
    first, second = step(generator, 50, 3, 0), step(generator, 50, 3, 50)
    ring, resumed = AdvantageRing(3, 16, "cpu"), AdvantageRing(3, 16, "cpu")
    ring.append(*first)
    state = ring.state_dict()
    at_save = {name: tensor.clone() for name, tensor in state.items()}
    ring.append(*second)
    assert all(torch.equal(state[name], at_save[name]) for name in state)  # a copy: it does not move with the ring
    resumed.load_state_dict(state)
    resumed.append(*second)
    for name, tensor in ring.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(ring.scale(0.4, 4), resumed.scale(0.4, 4), strict=True))


def test_nothing_is_read_on_the_host():
    # The meta device has no values: any .item(), branch on a value or boolean indexing would raise.
    ring = AdvantageRing(3, 16, "meta")
    advantage, task, eligible, slot = (column.to("meta") for column in step(torch.Generator(), 40, 3, 0))
    ring.append(advantage, task, eligible, slot)
    scale = ring.scale(0.4, minimum=4)
    assert choose_indicator(advantage, task, eligible, eligible, scale, eligible[0]).shape == (40,)
    assert choose_indicator(advantage, task, eligible, eligible, scale, False).shape == (40,)


@pytest.mark.parametrize("unknown", [False, True, torch.tensor(False), torch.tensor(True)])
def test_indicator_table(unknown):
    scale = AdvantageScale(torch.tensor([0.1, -0.2]), torch.ones(2), torch.tensor([True, False]))
    rows = [  # advantage, task, forced, dropped -> known, unknown
        (0.2, 0, False, False, POSITIVE, NONE),
        (0.1, 0, False, False, NEGATIVE, NONE),  # a tie
        (0.0, 0, False, False, NEGATIVE, NONE),
        (0.9, 1, False, False, NONE, NONE),  # its task is not ready
        (-0.9, 0, True, False, POSITIVE, POSITIVE),
        (-0.9, 1, True, False, POSITIVE, POSITIVE),
        (0.2, 0, False, True, NONE, NONE),
        (0.2, 0, True, True, NONE, NONE),
    ]
    advantage, task, forced, dropped, if_known, if_unknown = (torch.tensor(c) for c in zip(*rows, strict=True))
    indicator = choose_indicator(advantage, task, forced, dropped, scale, unknown)
    assert indicator.tolist() == (if_unknown if unknown else if_known).tolist()
    assert indicator.dtype == torch.int64


def test_a_sample_without_a_td_target_gets_no_label():
    scale = AdvantageScale(torch.tensor([0.1]), torch.ones(1), torch.tensor([True]))
    no, yes = torch.tensor([False] * 3), torch.tensor([False, False, True])
    unknown = torch.tensor([False, True, True])
    indicator = choose_indicator(torch.full((3,), 0.2), torch.zeros(3).long(), yes, no, scale, unknown)
    assert indicator.tolist() == [POSITIVE, NONE, POSITIVE]


def test_corrections_are_always_forced_and_demonstrations_by_choice():
    source = torch.tensor([SOURCE_IDS["demo"], SOURCE_IDS["auto"], SOURCE_IDS["intervention"]])
    assert forced_positive(source, "positive").tolist() == [True, False, True]
    assert forced_positive(source, "labelled").tolist() == [False, False, True]
