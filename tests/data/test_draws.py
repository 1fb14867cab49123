import numpy as np
import pytest

from recap_ds.data.draws import Purpose, evaluation_noise, generator, identity_of, training_draws

SHAPE = (2, 5, 3)


def flat(draws):
    return np.concatenate([draws.noise.ravel(), draws.time_uniform, [draws.indicator_dropped], draws.augmentation])


def test_same_place_gives_the_same_draws_whatever_was_drawn_before():
    first = flat(training_draws(3, 17, SHAPE, 0.3))
    for slot in (0, 16, 18):
        training_draws(3, slot, SHAPE, 0.3)
    np.testing.assert_array_equal(first, flat(training_draws(3, 17, SHAPE, 0.3)))


@pytest.mark.parametrize("seed, slot", [(4, 17), (3, 18), (3, 17 + 2**40)])
def test_another_seed_or_slot_gives_other_draws(seed, slot):
    here, there = training_draws(3, 17, SHAPE, 0.3), training_draws(seed, slot, SHAPE, 0.3)
    for name in ("noise", "time_uniform", "augmentation"):
        assert not np.isin(getattr(here, name), getattr(there, name)).any(), name


def test_purposes_and_places_never_share_a_stream():
    places = [(), (1,), (0, 1), (0, 0, 1), (1, 1)]
    draws = [generator(0, purpose, *place).random(64) for purpose in Purpose for place in places]
    assert len(np.unique(draws)) == 64 * len(draws)


def test_streams_of_neighbouring_slots_do_not_overlap():
    # Philox counts up while drawing: a long stream must not run into the next slot's.
    long = generator(0, Purpose.FLOW_NOISE, 5).random(100_000)
    assert not np.isin(generator(0, Purpose.FLOW_NOISE, 6).random(16), long).any()


def test_moments():
    noise = np.stack([training_draws(0, slot, (4, 10, 14), 0.3).noise for slot in range(200)])
    # 112,000 draws: the standard error of the mean is 0.003, of the variance 0.0042.
    assert abs(noise.mean()) < 0.012
    assert abs(noise.var() - 1) < 0.017
    # Slots are independent of each other.
    rows = noise.reshape(200, -1)
    correlation = (rows[1:] * rows[:-1]).mean()
    assert abs(correlation) < 0.012
    small = [training_draws(0, slot, (1, 1, 1), 0.3) for slot in range(4000)]
    assert abs(np.mean([draw.indicator_dropped for draw in small]) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    assert abs(np.mean([draw.time_uniform for draw in small]) - 0.5) < 4 * np.sqrt(1 / 12 / 4000)


def test_largest_seed_and_no_dropout():
    draws = training_draws(2**63 - 1, 0, SHAPE, 0.0)
    assert not draws.indicator_dropped
    assert draws.noise.dtype == np.float32 and draws.noise.shape == SHAPE


def test_evaluation_is_keyed_by_the_sample_and_apart_from_training():
    identity = identity_of("set/3", 7)
    noise = evaluation_noise(0, identity, SHAPE)
    np.testing.assert_array_equal(noise, evaluation_noise(0, identity, SHAPE))
    assert not np.isin(training_draws(0, identity, SHAPE, 0.0).noise, noise).any()


def test_identity_is_fixed_for_ever_and_separates_names():
    # printf 'set/3\\0007' | b2sum -l 64, read as little-endian.
    assert identity_of("set/3", 7) == int.from_bytes(bytes.fromhex("b80f28ed0dbc2da4"), "little")
    assert identity_of("a", "bc") != identity_of("ab", "c")
