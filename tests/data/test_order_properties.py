"""The order of samples for any shards, mixtures, seeds and worlds (hypothesis draws them, the same on every run)."""

import numpy as np
import pytest

from recap_ds.config import BatchSizes, DataConfig
from recap_ds.data.loader import SlotBatches
from recap_ds.data.mixture import BLOCK_SLOTS
from recap_ds.data.order import SampleOrder
from recap_ds.data.split import held_out_episodes
from tests.data.made_index import ids_of, made_parts

hypothesis = pytest.importorskip("hypothesis", reason="pip install 'recap_ds[test]'")
st = hypothesis.strategies

FEW = hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
NAMES = ("demo", "demo/a", "auto", "intervention")
shard_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=7)
sizes_by_part = st.dictionaries(st.sampled_from(NAMES), shard_sizes, min_size=1, max_size=4).map(
    lambda sizes: {name: sizes[name] for name in NAMES if name in sizes}
)
seeds = st.integers(0, 2**63 - 1)


@st.composite
def made_data(draw) -> tuple[dict[str, list[int]], DataConfig, int]:
    """Shards, settings and a global batch that divides over 1, 2 and 4 ranks and the lanes."""
    sizes = draw(sizes_by_part)
    weights = st.fixed_dictionaries({name: st.floats(0.02, 1) for name in sizes})
    steps = st.integers(1, 2000)
    capped = draw(st.sets(st.sampled_from(sorted(sizes))))
    if all(name in capped or name.partition("/")[0] in capped for name in sizes):
        capped = set()  # nothing would be left to draw
    data = DataConfig(
        mixture=draw(st.none() | weights),
        mixture_schedule=draw(st.dictionaries(steps, weights, max_size=3)),
        max_epochs={name: draw(st.floats(0.5, 20)) for name in sorted(capped)},
        lanes=draw(st.sampled_from((1, 2, 4))),
        shuffle_shards=draw(st.integers(1, 9)),
    )
    return sizes, data, 4 * draw(st.integers(1, 6))


@FEW
@hypothesis.given(made_data(), seeds, st.integers(0, 10**9), st.integers(1, 11))
def test_global_batches_are_the_same_for_every_world_accumulation_and_start(made, seed, first_step, stop):
    sizes, data, batch = made
    parts = made_parts(sizes)
    slots = np.arange(first_step * batch, (first_step + 12) * batch)
    whole = SampleOrder(parts, data, seed, batch).samples(slots)[1].reshape(12, batch)
    for world, accumulation in ((1, 4), (2, 2), (4, 1)):
        layout = BatchSizes(micro=batch // world // accumulation, accumulation=accumulation, world=world)
        # Stopped after ``stop`` steps, and gone on with by ranks that know nothing but the next slot.
        for steps in (range(stop), range(stop, 12)):
            start = slots[0] + steps.start * batch
            by_rank = []
            for rank in range(world):
                order = SampleOrder(parts, data, seed, batch)
                micro = [order.samples(np.array(each))[1] for each in SlotBatches(start, len(steps), layout, rank)]
                by_rank.append(np.array(micro).reshape(len(steps), -1))
            np.testing.assert_array_equal(np.concatenate(by_rank, axis=1), whole[list(steps)])


@FEW
@hypothesis.given(made_data(), seeds)
def test_no_sample_comes_again_before_all_others_of_its_part(made, seed):
    sizes, data, batch = made
    data = data.model_copy(update={"lanes": 1})
    order = SampleOrder(made_parts(sizes), data, seed, batch)
    num_slots = 3 * BLOCK_SLOTS
    parts, ids = order.samples(np.arange(num_slots))
    for number, part in enumerate(order.parts):
        mine = ids[parts == number]
        whole = len(mine) // part.samples.num_samples * part.samples.num_samples
        epochs = np.sort(mine[:whole].reshape(-1, part.samples.num_samples))
        assert (epochs == np.sort(ids_of(part))).all()
        assert len(np.unique(mine[whole:])) == len(mine) - whole
        cap = data.max_epochs.get(part.name, data.max_epochs.get(part.source))
        assert cap is None or len(mine) <= round(cap * part.samples.num_samples)
    for source, taken in order.epochs(num_slots).items():
        of_it = [number for number, part in enumerate(order.parts) if source in (part.name, part.source)]
        total = sum(order.parts[number].samples.num_samples for number in of_it)
        assert taken == pytest.approx(np.isin(parts, of_it).sum() / total)


@FEW
@hypothesis.given(sizes_by_part, st.data(), seeds, st.integers(0, 10**6))
def test_proportions_are_exact_at_the_end_of_a_block_and_near_within_it(sizes, more, seed, block):
    weights = {name: more.draw(st.floats(0.02, 1)) for name in sizes}
    order = SampleOrder(made_parts(sizes), DataConfig(mixture=weights), seed, 4)
    drawn, _ = order.samples(np.arange(block * BLOCK_SLOTS, (block + 1) * BLOCK_SLOTS))
    total = sum(weights.values())
    for number, name in enumerate(sizes):
        taken, share = np.cumsum(drawn == number), weights[name] / total
        assert abs(taken[-1] - share * BLOCK_SLOTS) < 1  # a slot is as fine as it gets
        expected = np.arange(1, BLOCK_SLOTS + 1) * taken[-1] / BLOCK_SLOTS
        assert np.abs(taken - expected).max() <= 3 * np.sqrt(BLOCK_SLOTS)


@FEW
@hypothesis.given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.floats(0, 0.95),
    st.integers(0, 60),
)
def test_no_episode_of_training_is_held_out_however_many_there_are(tasks, fraction, num_before):
    """``tasks``: of each episode. Added ones never bring one that was trained on, but for what ``split.py`` names."""
    names, task = [f"set/{number}" for number in range(len(tasks))], np.array(tasks)
    after = held_out_episodes(names, task, fraction)
    before = held_out_episodes(names[:num_before], task[:num_before], fraction)
    for number in np.unique(task):
        mine = np.flatnonzero(task == number)
        assert not after[mine].all()
        assert after[mine].any() == (fraction > 0 and len(mine) > 1)
        known = mine[mine < num_before]
        if len(known) > 1 and not (fraction > 0 and before[known].sum() == len(known) - 1):
            assert not (after[known] & ~before[known]).any()
