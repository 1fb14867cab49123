"""Quotas, segments of a schedule, caps on repeats, and what a table of weights means."""

from types import SimpleNamespace

import numpy as np
import pytest

from recap_ds.data.mixture import BLOCK_SLOTS, Mixture, Table, block_quotas
from recap_ds.data.parts import part_weights
from recap_ds.errors import UsageError
from tests.data.made_index import made_order, made_parts

NAMES = ("demo", "auto", "intervention")


def quotas(*weights: float) -> list[int]:
    return block_quotas("data.mixture", NAMES, np.array(weights)).tolist()


def test_largest_remainder():
    assert quotas(300, 100, 0) == [3072, 1024, 0]
    # A third each of 4096 leaves one slot, which goes to the first of the equals.
    assert quotas(1, 1, 1) == [1366, 1365, 1365]
    assert quotas(0.7001, 0.2999, 0) == [2868, 1228, 0]


@pytest.mark.parametrize(
    "sizes, data, message",
    [
        ({"demo": [5]}, {"mixture": {"demo": 1, "auto": 1}}, "data.mixture.auto: the shards hold no auto sample"),
        ({"demo": [5], "auto": [5]}, {"mixture": {"demo": 1, "auto": 1e-4}}, "data.mixture.auto: .* below 1/4096"),
        (
            {"demo": [5]},
            {"mixture_schedule": {7: {"auto": 1}}},
            "data.mixture_schedule.7.auto: the shards hold no auto sample",
        ),
        (
            {"demo": [5], "auto": [5]},
            {"max_epochs": {"demo": 1, "auto": 2}},
            "data.max_epochs: from step 1 on nothing is left to draw by the weights of data.mixture; leave one",
        ),
        (
            {"demo": [5], "auto": [5]},
            {"mixture_schedule": {9: {"auto": 1}}, "max_epochs": {"auto": 3}},
            "data.max_epochs: from step 9 on nothing is left to draw by the weights of data.mixture_schedule.9",
        ),
    ],
)
def test_impossible_mixtures_are_one_line(sizes, data, message):
    with pytest.raises(UsageError, match=message) as caught:
        made_order(sizes, **data)
    assert "\n" not in str(caught.value)


def test_every_block_holds_the_quotas_and_k_counts_each_part():
    mixture = Mixture(
        NAMES, [Table("data.mixture", 0, np.array([1000, 3000, 96]))], [None] * 3, seed=5, slots_per_step=1
    )
    part, k = mixture.draws(np.arange(3 * BLOCK_SLOTS))
    for number, quota in enumerate((1000, 3000, 96)):
        np.testing.assert_array_equal(k[part == number], np.arange(3 * quota))
        assert [(block == number).sum() for block in part.reshape(3, -1)] == [quota] * 3
    assert not np.array_equal(part[:BLOCK_SLOTS], part[BLOCK_SLOTS : 2 * BLOCK_SLOTS])


def test_a_source_in_a_table_stands_for_its_data_sets_that_the_table_does_not_name():
    parts = made_parts({"demo": [10], "demo/a": [30], "demo/b": [60], "auto": [40]})

    def weights(table):
        return part_weights("data.mixture", table, parts).tolist()

    assert weights(None) == [10, 30, 60, 40]
    assert weights({"demo": 1.0, "auto": 1.0}) == pytest.approx([0.1, 0.3, 0.6, 1.0])
    assert weights({"demo": 1.0, "demo/b": 2.0}) == pytest.approx([0.25, 0.75, 2.0, 0.0])
    assert weights({"demo/a": 5.0}) == [0, 5, 0, 0]


@pytest.mark.parametrize("sizes", [[1000, 10_000_000, 2000], [10, 40_960, 60], [1, 1, 10**9], [3000, 10**7, 2500]])
def test_without_a_table_a_source_of_few_samples_has_one_slot_in_a_block(sizes):
    parts = made_parts({name: [10] for name in NAMES})
    parts = [part._replace(samples=SimpleNamespace(num_samples=size)) for part, size in zip(parts, sizes, strict=True)]
    quotas = block_quotas("data.mixture", NAMES, part_weights("data.mixture", None, parts))
    exact = np.array(sizes) / sum(sizes) * BLOCK_SLOTS
    assert quotas.sum() == BLOCK_SLOTS and (quotas[exact < 1] == 1).all() and (np.abs(quotas - exact) < 2).all()


def test_a_schedule_changes_the_weights_at_its_step_and_every_part_goes_on_where_it_was():
    order = made_order(
        {"demo": [100], "auto": [100]},
        slots_per_step=10,
        mixture={"demo": 3, "auto": 1},
        mixture_schedule={1000: {"demo": 1, "auto": 1}, 3000: {"auto": 1}},
    )
    parts, ids = order.samples(np.arange(40_000))
    first, second, third = parts[:10_000], parts[10_000:30_000], parts[30_000:]
    assert [(block == 0).sum() for block in first[:8192].reshape(2, -1)] == [3072] * 2
    assert [(block == 0).sum() for block in second[:16384].reshape(4, -1)] == [2048] * 4
    assert (third == 1).all()
    for part in (0, 1):
        mine = ids[parts == part]
        whole = len(mine) // 100
        assert (np.sort(mine[: whole * 100].reshape(whole, 100)) == np.unique(mine)).all()


def test_a_capped_part_is_drawn_exactly_as_often_as_it_may_and_the_others_take_its_share():
    sizes = {"demo": [500], "auto": [40], "intervention": [60]}
    order = made_order(sizes, mixture={"demo": 2, "auto": 1, "intervention": 1}, max_epochs={"auto": 2.5})
    parts, ids = order.samples(np.arange(3 * BLOCK_SLOTS))
    _, times = np.unique(ids[parts == 1], return_counts=True)
    assert sorted(times) == [2] * 20 + [3] * 20
    last = np.flatnonzero(parts == 1)[-1]
    after = parts[last + 1 :][:BLOCK_SLOTS]
    assert np.bincount(after, minlength=3).tolist() == [2731, 0, 1365]
    assert order.epochs(3 * BLOCK_SLOTS)["auto"] == 2.5


def test_a_cap_of_a_source_holds_for_each_data_set_and_goes_by_its_own_where_it_has_one():
    sizes = {"demo": [100], "auto": [10], "auto/a": [20]}
    order = made_order(sizes, mixture={"demo": 1, "auto": 1}, max_epochs={"auto": 4, "auto/a": 1})
    order.samples(np.arange(1000))
    assert order.epochs(1000)["auto/a"] == 1
    assert order.epochs(1000)["auto"] == pytest.approx((4 * 10 + 20) / 30)


def test_caps_hold_over_all_lanes():
    sizes = {"demo": [100] * 4, "auto": [7, 9, 11, 5], "intervention": [10]}
    order = made_order(sizes, slots_per_step=12, lanes=4, max_epochs={"auto": 2, "intervention": 3})
    parts, ids = order.samples(np.arange(12_000))
    assert set(np.unique(ids[parts == 1], return_counts=True)[1]) == {2}
    assert set(np.unique(ids[parts == 2], return_counts=True)[1]) == {3}
