"""The order of samples without files: exact proportions, whole epochs, any start, lanes; and that it never changes."""

import hashlib

import numpy as np
import pytest

from recap_ds.config import DataConfig
from recap_ds.data.epochs import Epochs, KeptSamples
from recap_ds.data.mixture import BLOCK_SLOTS
from recap_ds.data.order import SampleOrder
from recap_ds.data.parts import Part
from recap_ds.errors import UsageError
from tests.data.made_index import ids_of, made_index, made_order, made_parts

THREE = {"demo": [50, 37, 64, 64, 9], "auto": [100, 100], "intervention": [31]}
SLOTS = np.arange(4 * BLOCK_SLOTS)


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:16]


# Every run's order is in these numbers: a change of them would break the resume of all runs there are.
@pytest.mark.parametrize(
    "mixture, sources, ids",
    [
        (None, "8660c406cb0ce1fa", "8b98bc0845aa2ea7"),
        ({"demo": 1, "intervention": 3}, "c8c39081255fe217", "9a6defa899bc93ae"),
        ({"demo": 0.5, "auto": 0.25, "intervention": 0.25}, "89b367b5439d780b", "722e6a010cb9b576"),
    ],
)
def test_the_order_of_existing_runs_stands(mixture, sources, ids):
    shard_starts, kept = [], np.zeros(21_000, bool)
    for first, sizes in zip((0, 10_000, 20_000), THREE.values(), strict=True):
        mine = first + np.flatnonzero(np.arange(2 * sum(sizes)) % 3 != 1)[: sum(sizes)]
        kept[mine] = True
        shard_starts.append(mine[np.cumsum([0, *sizes[:-1]])])
    index = made_index(np.diff([*np.concatenate(shard_starts), len(kept)]).tolist())
    shards = np.split(np.arange(8), [5, 7])
    parts = [Part(name, name, KeptSamples(index, mine, kept)) for name, mine in zip(THREE, shards, strict=True)]
    order = SampleOrder(parts, DataConfig(mixture=mixture, shuffle_shards=2), seed=7, slots_per_step=8)
    slots = np.concatenate([np.arange(9000), np.arange(10**9, 10**9 + 5000)])
    found_parts, found_ids = order.samples(slots)
    assert (digest(found_parts), digest(found_ids)) == (sources, ids)
    assert [order.replacement(0, 5, attempt) for attempt in range(4)] == [314, 98, 161, 74]


def test_each_epoch_of_a_part_visits_every_kept_sample_once():
    (part,) = made_parts({"demo": THREE["demo"]})
    seen = Epochs(0, part.samples, seed=1, shuffle_shards=2).draw(np.arange(3 * 224)).reshape(3, -1)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), ids_of(part))
    assert not np.array_equal(seen[0], seen[1])
    assert [part.samples.at(place) for place in range(224)] == ids_of(part).tolist()


def test_samples_are_shuffled_within_windows_of_shards():
    (part,) = made_parts({"demo": [50] * 8}, held_out=False)
    ids = Epochs(0, part.samples, seed=1, shuffle_shards=2).draw(np.arange(400))
    windows = (ids // 50).reshape(4, 100)
    assert [len(np.unique(window)) for window in windows] == [2, 2, 2, 2]
    assert not np.array_equal(np.unique(windows[0]), [0, 1]) or not np.array_equal(np.unique(windows[1]), [2, 3])
    assert (np.diff(ids[:100]) == 1).mean() < 0.1


def test_whole_order_repeats_exactly_and_changes_with_the_seed():
    first = made_order(THREE).samples(SLOTS)[1]
    np.testing.assert_array_equal(first, made_order(THREE).samples(SLOTS)[1])
    assert (first == made_order(THREE, seed=1).samples(SLOTS)[1]).mean() < 0.1


def test_slots_may_come_in_any_grouping_and_direction():
    slots = np.arange(BLOCK_SLOTS - 100, BLOCK_SLOTS + 100)
    for data in ({}, {"lanes": 2, "mixture_schedule": {512: {"demo": 1}}, "max_epochs": {"auto": 3}}):
        whole, one = made_order(THREE, **data).samples(slots)[1], made_order(THREE, **data)
        singly = np.concatenate([one.samples(slots[i : i + 1])[1] for i in reversed(range(200))])[::-1]
        np.testing.assert_array_equal(whole, singly)


def test_a_far_slot_costs_no_more_than_a_near_one():
    # 10^12 slots in: only arithmetic and the current permutations are needed.
    order = made_order(THREE)
    part, ids = order.samples(np.array([10**12]))
    assert ids[0] in ids_of(order.parts[part[0]])


def test_replacements_come_from_the_same_part_and_differ_by_attempt():
    order = made_order(THREE)
    ids = [order.replacement(1, 9, attempt) for attempt in range(8)]
    assert np.isin(ids, ids_of(order.parts[1])).all() and len(set(ids)) > 4
    assert ids == [made_order(THREE).replacement(1, 9, attempt) for attempt in range(8)]


def test_epochs_taken_are_counted_exactly_by_source_and_by_data_set():
    order = made_order({"demo": [10, 10], "demo/a": [20], "auto": [40]}, mixture={"demo": 1, "demo/a": 2, "auto": 1})
    parts, _ = order.samples(np.arange(5003))
    draws = np.bincount(parts)
    expected = {"demo": (draws[0] + draws[1]) / 40, "auto": draws[2] / 40, "demo/a": draws[1] / 20}
    assert order.epochs(5003) == pytest.approx(expected, abs=1e-12)
    assert order.epochs(0) == {"demo": 0, "auto": 0, "demo/a": 0}


def lane_shards(order: SampleOrder, sizes: dict[str, list[int]], num_steps: int, slots_per_step: int) -> list[set[int]]:
    """Shards that each quarter of the global batches reads."""
    starts = np.cumsum([0, *(2 * size for shards in sizes.values() for size in shards)])
    ids = order.samples(np.arange(num_steps * slots_per_step))[1].reshape(num_steps, 4, -1)
    return [set((np.searchsorted(starts, ids[:, lane].ravel(), side="right") - 1).tolist()) for lane in range(4)]


def test_lanes_share_out_the_shards_and_a_small_part_goes_to_all():
    sizes = {"demo": [50] * 12, "auto": [20, 30, 40, 50, 60], "intervention": [30, 30]}
    demo, auto, small = set(range(12)), set(range(12, 17)), {17, 18}
    order = made_order(sizes, slots_per_step=16, lanes=4)
    shards = lane_shards(order, sizes, 1000, 16)
    assert [len(lane & demo) for lane in shards] == [3, 3, 3, 3]
    assert set().union(*shards) == demo | auto | small and all(lane >= small for lane in shards)
    for one in range(4):
        for other in range(one):
            assert not shards[one] & shards[other] & (demo | auto)
    # Every lane has the mixture's proportions, and a part that all draw from has whole epochs over them together.
    parts, ids = order.samples(np.arange(4 * BLOCK_SLOTS))
    by_lane = parts.reshape(-1, 4, 4).transpose(1, 0, 2).reshape(4, BLOCK_SLOTS)
    assert len({tuple(np.bincount(lane)) for lane in by_lane}) == 1
    _, times = np.unique(ids[parts == 2], return_counts=True)
    assert times.max() - times.min() <= 2  # lanes are not at the same draw at every moment
    first = parts == 0
    # 600 of 860 samples, so 2857 of 4096 slots of each lane, whose 150 samples are drawn 19 times and some once more.
    _, times = np.unique(ids[first], return_counts=True)
    assert set(times) == {19, 20}
    assert [order.replacement(0, slot, 0) // 100 in shards[slot * 4 // 16] for slot in range(16)] == [True] * 16


def test_lanes_must_divide_the_global_batch():
    with pytest.raises(UsageError, match=r"data\.lanes: 3 lanes do not divide the global batch of 8"):
        made_order(THREE, lanes=3)


def test_nothing_to_draw_is_one_line():
    with pytest.raises(UsageError, match=r"data\.shards: no sample is left for training"):
        made_order({})
