import numpy as np
import pytest

from recap_ds.batch import SOURCE_IDS
from recap_ds.data.order import (
    BLOCK_SLOTS,
    KeptSamples,
    Mixture,
    SampleOrder,
    SourceEpochs,
    block_quotas,
    group_by_shard,
)
from recap_ds.errors import UsageError


def kept_samples(first: int, sizes: list[int]) -> KeptSamples:
    """Ids from ``first`` on, every third one missing as if held out, spread over shards of the given sizes."""
    ids = first + np.flatnonzero(np.arange(2 * sum(sizes)) % 3 != 1)[: sum(sizes)]
    return group_by_shard(ids, np.repeat(np.arange(len(sizes)), sizes))


def three_sources() -> dict[str, KeptSamples]:
    return {
        "demo": kept_samples(0, [50, 37, 64, 64, 9]),
        "auto": kept_samples(10_000, [100, 100]),
        "intervention": kept_samples(20_000, [31]),
    }


def order(seed: int = 0, weights: dict | None = None, shuffle_shards: int = 2) -> SampleOrder:
    return SampleOrder(three_sources(), weights, seed, shuffle_shards)


def test_group_by_shard_drops_empty_shards():
    kept = group_by_shard(np.array([3, 4, 9]), np.array([0, 0, 5]))
    np.testing.assert_array_equal(kept.shard_starts, [0, 2, 3])


def test_default_quotas_follow_the_sample_counts():
    quotas = block_quotas(None, {"demo": 300, "auto": 100, "intervention": 0})
    np.testing.assert_array_equal(quotas, [3072, 1024, 0])


def test_largest_remainder():
    # A third each of 4096 leaves one slot, which goes to the first of the equals.
    np.testing.assert_array_equal(
        block_quotas(dict.fromkeys(SOURCE_IDS, 1.0), dict.fromkeys(SOURCE_IDS, 9)), [1366, 1365, 1365]
    )
    np.testing.assert_array_equal(
        block_quotas({"demo": 0.7001, "auto": 0.2999}, {"demo": 1, "auto": 1}), [2868, 1228, 0]
    )


@pytest.mark.parametrize(
    "weights, counts, message",
    [
        ({"demo": 1, "auto": 1}, {"demo": 5}, "data.mixture.auto: the shards hold no auto sample"),
        ({"demo": 1, "auto": 1e-4}, {"demo": 5, "auto": 5}, "below 1/4096"),
        (None, {"demo": 1_000_000, "intervention": 10}, "data.mixture.intervention"),
        ({"demo": -1, "auto": 2}, {"demo": 5, "auto": 5}, "negative"),
        (None, {"demo": 0}, "no sample is left"),
    ],
)
def test_impossible_mixtures_are_one_line(weights, counts, message):
    with pytest.raises(UsageError, match=message) as caught:
        block_quotas(weights, counts)
    assert "\n" not in str(caught.value)


def test_every_block_holds_the_quotas_and_k_counts_each_source():
    quotas = np.array([1000, 3000, 96])
    source, k = Mixture(quotas, seed=5).draws(np.arange(3 * BLOCK_SLOTS))
    for number, quota in enumerate(quotas):
        np.testing.assert_array_equal(k[source == number], np.arange(3 * quota))
        for block in range(3):
            assert (source[block * BLOCK_SLOTS : (block + 1) * BLOCK_SLOTS] == number).sum() == quota
    assert not np.array_equal(source[:BLOCK_SLOTS], source[BLOCK_SLOTS : 2 * BLOCK_SLOTS])


def test_each_epoch_of_a_source_visits_every_kept_sample_once():
    kept = kept_samples(100, [50, 37, 64, 64, 9])
    epochs = SourceEpochs(0, kept, seed=1, shuffle_shards=2)
    seen = epochs.samples(np.arange(3 * len(kept.ids))).reshape(3, -1)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), kept.ids)
    assert not np.array_equal(seen[0], seen[1])


def test_samples_are_shuffled_within_windows_of_shards():
    kept = group_by_shard(np.arange(400), np.repeat(np.arange(8), 50))
    ids = SourceEpochs(0, kept, seed=1, shuffle_shards=2).samples(np.arange(400))
    windows = (ids // 50).reshape(4, 100)
    assert [len(np.unique(window)) for window in windows] == [2, 2, 2, 2]
    assert not np.array_equal(np.unique(windows[0]), [0, 1]) or not np.array_equal(np.unique(windows[1]), [2, 3])
    assert (np.diff(ids[:100]) == 1).mean() < 0.1


def test_whole_order_repeats_exactly_and_changes_with_the_seed():
    slots = np.arange(2 * BLOCK_SLOTS)
    first = order(seed=0).samples(slots)[1]
    np.testing.assert_array_equal(first, order(seed=0).samples(slots)[1])
    assert (first == order(seed=1).samples(slots)[1]).mean() < 0.1


def test_mixture_weights_set_the_shares_whatever_the_sources_hold():
    source, ids = order(weights={"demo": 1, "intervention": 3}).samples(np.arange(BLOCK_SLOTS))
    np.testing.assert_array_equal(np.bincount(source, minlength=3), [1024, 0, 3072])
    _, counts = np.unique(ids[source == 2], return_counts=True)
    assert counts.max() - counts.min() <= 1  # 3072 draws of 31 samples: whole epochs and a part of one


def test_a_start_at_any_slot_equals_the_sequential_order():
    slots = np.arange(4 * BLOCK_SLOTS)
    whole = order().samples(slots)[1]
    for start in (1, 777, BLOCK_SLOTS - 3, 3 * BLOCK_SLOTS + 5):
        np.testing.assert_array_equal(order().samples(slots[start : start + 64])[1], whole[start : start + 64])


def test_slots_may_come_in_any_grouping_and_direction():
    slots = np.arange(BLOCK_SLOTS - 100, BLOCK_SLOTS + 100)
    whole = order().samples(slots)[1]
    one = order()
    singly = np.concatenate([one.samples(slots[i : i + 1])[1] for i in reversed(range(200))])[::-1]
    np.testing.assert_array_equal(whole, singly)


def test_a_far_slot_costs_no_more_than_a_near_one():
    # 10^12 slots in: only arithmetic and the current permutations are needed.
    source, ids = order().samples(np.array([10**12]))
    assert ids[0] in three_sources()[list(SOURCE_IDS)[source[0]]].ids


def test_replacements_come_from_the_same_source_and_differ_by_attempt():
    sample_order, kept = order(), three_sources()["auto"]
    ids = [sample_order.replacement(SOURCE_IDS["auto"], 9, attempt) for attempt in range(8)]
    assert np.isin(ids, kept.ids).all() and len(set(ids)) > 4
    assert ids == [order().replacement(SOURCE_IDS["auto"], 9, attempt) for attempt in range(8)]
