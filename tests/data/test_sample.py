import io

import numpy as np
import pytest

from recap_ds.data.sample import SampleDecoder, check_data_matches
from recap_ds.data.shard_set import DamagedSample
from recap_ds.errors import UsageError
from recap_ds.processing.images import encode_jpeg
from recap_ds.processing.normalize import Affine, Normalizer
from tests.data.tiny_shards import flat_episode, tiny_config, write_tiny


@pytest.fixture
def shard_set(tmp_path):
    return write_tiny(tmp_path, [flat_episode(2, 7)])


def plain_normalizer() -> Normalizer:
    def identity(dims: int, width: int) -> Affine:
        return Affine(np.zeros(dims, np.float32), np.ones(dims, np.float32), width)

    return Normalizer("mean_std", identity(3, 4), identity(2, 3))


def read(shard_set, frame: int, needs_next: bool = True, config=None):
    sample = int(np.flatnonzero(shard_set.table.frame == frame)[0])
    decoder = SampleDecoder(shard_set.manifest, config or tiny_config(), plain_normalizer())
    return decoder.read(shard_set, sample, needs_next)


def test_arrays_by_hand(shard_set):
    arrays = read(shard_set, frame=1)
    np.testing.assert_array_equal(arrays.view.state, [2, 1, 1, 0])
    np.testing.assert_array_equal(arrays.actions, [[21, -1, 0], [22, -2, 0], [23, -3, 0], [24, -4, 0]])
    np.testing.assert_array_equal(arrays.next_view.state, [2, 5, 1, 0])
    assert arrays.view.images.shape == (2, 3, 16, 16) and arrays.view.images.dtype == np.uint8
    # JPEG keeps flat grey to within a level.
    for view, t in ((arrays.view, 1), (arrays.next_view, 5)):
        np.testing.assert_allclose(view.images[0].astype(int), 40 + t, atol=1)
        np.testing.assert_allclose(view.images[1].astype(int), 200 - t, atol=1)
        assert view.camera_mask.all()


def test_actions_past_the_end_are_zero_also_where_normalising_moves_zero(shard_set):
    normalizer = plain_normalizer()
    moved = normalizer.actions._replace(center=np.array([5.0, 5.0], np.float32))
    decoder = SampleDecoder(shard_set.manifest, tiny_config(), normalizer._replace(actions=moved))
    sample = int(np.flatnonzero(shard_set.table.frame == 5)[0])
    actions = decoder.read(shard_set, sample, needs_next=False).actions
    np.testing.assert_array_equal(actions, [[20, -10, 0], [21, -11, 0], [0, 0, 0], [0, 0, 0]])


def test_a_next_observation_that_is_not_needed_is_zero(shard_set):
    arrays = read(shard_set, frame=1, needs_next=False)
    for part in arrays.next_view:
        assert not part.any()


def test_cameras_are_chosen_ordered_and_scaled(shard_set):
    config = tiny_config(data={"cameras": ["right"]}, model={"image_size": 24})
    images = read(shard_set, frame=0, config=config).view.images
    assert images.shape == (1, 3, 24, 24)
    np.testing.assert_allclose(images.astype(int), 200, atol=1)
    swapped = read(shard_set, frame=0, config=tiny_config(data={"cameras": ["right", "left"]})).view.images
    assert swapped[0].mean() > 190 > 50 > swapped[1].mean()


def test_an_empty_slot_is_blank_and_masked(shard_set):
    config = tiny_config(data={"camera_slots": {"base": "right", "left_wrist": None, "right_wrist": "left"}})
    check_data_matches(config, shard_set.manifest)
    arrays = read(shard_set, frame=0, config=config)
    for view in (arrays.view, arrays.next_view):
        np.testing.assert_array_equal(view.camera_mask, [True, False, True])
        assert view.images[0].mean() > 150 > view.images[2].mean() > 30 and not view.images[1].any()


class FakeShardSet:
    """One sample whose members a test chooses."""

    def __init__(self, real, frame: int, **changes):
        sample = int(np.flatnonzero(real.table.frame == frame)[0])
        self.table = real.table
        self.members = {
            **real.read_members(sample),
            **{name.replace("__", "."): data for name, data in changes.items()},
        }
        self.members = {name: data for name, data in self.members.items() if data is not None}
        self.damaged = real.damaged

    def read_members(self, sample: int) -> dict[str, bytes]:
        return self.members


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_camera_a_sample_lacks_is_masked(shard_set):
    fake = FakeShardSet(shard_set, 1, left__jpg=None, left__next__jpg=None)
    arrays = SampleDecoder(shard_set.manifest, tiny_config(), plain_normalizer()).read(fake, 0, needs_next=True)
    for view in (arrays.view, arrays.next_view):
        np.testing.assert_array_equal(view.camera_mask, [False, True])
        assert not view.images[0].any()


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"left__jpg": encode_jpeg(np.zeros((16, 16, 3), np.uint8))[:-40]}, r"left\.jpg: not a whole JPEG"),
        ({"left__next__jpg": None}, "next observation lacks a camera"),
        ({"next_state__npy": None}, r"next_state\.npy is missing"),
        ({"state__npy": npy(np.zeros(4, np.float32))}, r"state\.npy: float32 \[4\], expected float32 \[3\]"),
        ({"state__npy": npy(np.zeros(3))}, r"state\.npy: float64 \[3\], expected float32"),
        ({"state__npy": npy(np.array([0, np.nan, 0], np.float32))}, r"state\.npy: holds NaN or inf"),
        ({"actions__npy": npy(np.full((6, 2), np.inf, np.float32))}, r"actions\.npy: holds NaN or inf"),
        ({"actions__npy": b""}, r"actions\.npy: not a plain numpy array"),
        ({"actions__npy": npy(np.array([{}], object))}, r"actions\.npy: not a plain numpy array"),
    ],
)
def test_damage_names_shard_key_and_member(shard_set, changes, what):
    decoder = SampleDecoder(shard_set.manifest, tiny_config(), plain_normalizer())
    with pytest.raises(DamagedSample, match=what) as caught:
        decoder.read(FakeShardSet(shard_set, 1, **changes), 0, needs_next=True)
    assert caught.value.shard == "demo-000000.tar" and caught.value.key.startswith("demo-000002-")


def test_environment_rewards_are_read_where_they_are_wanted(shard_set):
    fake = FakeShardSet(shard_set, 1, rewards__npy=npy(np.arange(6, dtype=np.float32)))
    rewards = {
        kind: SampleDecoder(shard_set.manifest, tiny_config(value={"reward": kind}), plain_normalizer())
        .read(fake, 0, needs_next=True)
        .rewards
        for kind in ("environment", "sparse_time")
    }
    np.testing.assert_array_equal(rewards["environment"], np.arange(6))
    np.testing.assert_array_equal(rewards["sparse_time"], np.zeros(6))


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"max_action_dim": 1}, r"max_action_dim: 1 is narrower than the shards' action_dim of 2"),
        ({"max_state_dim": 2}, r"max_state_dim: 2 is narrower than the shards' state_dim of 3"),
        ({"data": {"cameras": ["left", "top"]}}, r"data\.cameras: .* no camera 'top'; they have left, right"),
        ({"data": {"cameras": ["left", "left"]}}, r"data\.cameras: .* none twice"),
        ({"data": {"cameras": []}}, r"data\.cameras: \[\] must name at least one"),
        ({"data": {"camera_slots": {"base": "top"}}}, r"data\.camera_slots: .* no camera 'top'; they have left"),
        ({"chunk_size": 7}, r"chunk_size: 7 is more than the 6 frames"),
        ({"chunk_size": 3}, r"chunk_size: 3 is less than the shards' TD window of 4"),
        ({"chunk_size": 3, "iql": {"horizon": "manifest"}}, r"chunk_size: 3 is less than"),
        ({"chunk_size": 5}, r"chunk_size: 5 differs from the shards' TD window of 4 frames; .*iql\.horizon=manifest"),
        ({"value": {"reward": "environment"}}, r"value\.reward: environment needs recorded rewards"),
    ],
)
def test_data_that_does_not_fit_is_one_line(shard_set, sections, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_data_matches(tiny_config(**sections), shard_set.manifest)
    assert "\n" not in str(caught.value)


def test_data_that_fits(shard_set):
    check_data_matches(tiny_config(), shard_set.manifest)
    check_data_matches(tiny_config(chunk_size=6, iql={"horizon": "manifest"}), shard_set.manifest)


def test_joint_training_needs_next_observations(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 7)], store_next=False)
    with pytest.raises(UsageError, match="the shards hold no next observations"):
        check_data_matches(tiny_config(), shard_set.manifest)
