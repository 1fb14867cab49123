"""One sample's bytes -> the arrays a batch is stacked from, checked; and whether a data set fits a config at all.

Whatever does not read as it should (a broken picture, a wrong shape, a NaN) is a DamagedSample of that one sample;
whatever is wrong with the data set as a whole is a UsageError before training starts.

    C camera slots   P model.image_size   S max_state_dim   A max_action_dim   H chunk_size   W stored action width
"""

from typing import NamedTuple

import numpy as np

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.manifest import Manifest
from recap_ds.data.npy import npy_array
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.processing.images import decode_jpeg, resize_with_padding
from recap_ds.processing.normalize import Normalizer


class View(NamedTuple):
    """What one moment looks like; zeros where there is none."""

    images: np.ndarray  # [C, 3, P, P] uint8; of the next moment [0, 3, P, P] in a stage without TD
    camera_mask: np.ndarray  # [C] bool, True = the camera is there
    state: np.ndarray  # [S] float32, normalised


class SampleArrays(NamedTuple):
    view: View
    next_view: View
    actions: np.ndarray  # [H, A] float32, normalised; 0 past num_valid
    rewards: np.ndarray  # [W] float32 environment rewards; 0 where not read


class _WrongMember(ValueError):
    """A member that does not hold what it should; becomes a DamagedSample once shard and key are known."""


class SampleDecoder:
    """The fixed shapes of a run and how stored members fill them."""

    def __init__(self, manifest: Manifest, config: PiStarRECAPConfig, normalizer: Normalizer):
        self._slots = camera_slots(config, manifest)
        self._manifest = manifest
        self._normalizer = normalizer
        self._image_size = config.model.image_size
        self._chunk_size = config.chunk_size
        self._reads_rewards = config.value.reward == "environment"
        # A stage without TD never looks at next observations, and zeros of them would be half of every batch's bytes.
        self._num_next_cameras = len(self._slots) if config.learns_by_td else 0

    def read(self, shard_set: ShardSet, sample: int, needs_next: bool) -> SampleArrays:
        """Raises DamagedSample. ``needs_next``: the TD target reads the next observation."""
        return self.decode_sample(shard_set, sample, shard_set.read_members(sample), needs_next)

    def decode_sample(
        self, shard_set: ShardSet, sample: int, members: dict[str, bytes], needs_next: bool
    ) -> SampleArrays:
        """The same of members that were read elsewhere. Raises DamagedSample."""
        try:
            return self.decode(members, int(shard_set.table.num_valid[sample]), needs_next)
        except _WrongMember as error:
            raise shard_set.damaged(sample, str(error)) from None

    def blank(self) -> SampleArrays:
        """Stands where a batch has a row without a sample."""
        actions = np.zeros((self._chunk_size, self._normalizer.actions.width), np.float32)
        now, later = (self._blank_view(number) for number in (len(self._slots), self._num_next_cameras))
        return SampleArrays(now, later, actions, self._no_rewards())

    def _blank_view(self, num_cameras: int) -> View:
        side = self._image_size
        images = np.zeros((num_cameras, 3, side, side), np.uint8)
        return View(images, np.zeros(num_cameras, bool), np.zeros(self._normalizer.state.width, np.float32))

    def decode(self, members: dict[str, bytes], num_valid: int, needs_next: bool) -> SampleArrays:
        manifest = self._manifest
        actions = self._normalizer.actions.normalize(
            _array(members, "actions.npy", (manifest.action_width, manifest.action_dim))[: self._chunk_size]
        )
        actions[num_valid:] = 0
        view = self._view(members, state="state.npy", picture="jpg")
        next_view = self._blank_view(self._num_next_cameras)
        if needs_next:
            next_view = self._view(members, state="next_state.npy", picture="next.jpg")
            if (next_view.camera_mask != view.camera_mask).any():
                raise _WrongMember("the next observation lacks a camera of the first, or has one more")
        rewards = self._no_rewards()
        if self._reads_rewards:
            rewards = _array(members, "rewards.npy", (manifest.action_width,))
        return SampleArrays(view, next_view, actions, rewards)

    def _view(self, members: dict[str, bytes], state: str, picture: str) -> View:
        view = self._blank_view(len(self._slots))
        for slot, camera in enumerate(self._slots):
            name = f"{camera}.{picture}"
            if camera is None or name not in members:
                continue
            try:
                image = resize_with_padding(decode_jpeg(members[name]), self._image_size)
            except ValueError as error:
                raise _WrongMember(f"{name}: {error}") from None
            view.images[slot] = image.transpose(2, 0, 1)
            view.camera_mask[slot] = True
        view.state[:] = self._normalizer.state.normalize(_array(members, state, (self._manifest.state_dim,)))
        return view

    def _no_rewards(self) -> np.ndarray:
        return np.zeros(self._manifest.action_width, np.float32)


def read_actions(shard_set: ShardSet, sample: int) -> np.ndarray:
    """[W, A] float32 actions of one sample in the robot's own units, without decoding its images.

    Raises DamagedSample.
    """
    manifest = shard_set.manifest
    try:
        return _array(shard_set.read_members(sample), "actions.npy", (manifest.action_width, manifest.action_dim))
    except _WrongMember as error:
        raise shard_set.damaged(sample, str(error)) from None


def _array(members: dict[str, bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in members:
        raise _WrongMember(f"{name} is missing")
    try:
        array = npy_array(members[name])
    except ValueError as error:
        raise _WrongMember(f"{name}: not a plain numpy array ({error})") from None
    if array.shape != shape or array.dtype != np.float32:
        raise _WrongMember(f"{name}: {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
    if not np.isfinite(array).all():
        raise _WrongMember(f"{name}: holds NaN or inf")
    return array


def camera_slots(config: PiStarRECAPConfig, manifest: Manifest) -> tuple[str | None, ...]:
    """Camera of each slot, None = the slot is empty: the config's, or else the manifest's."""
    data = config.data
    if data.camera_slots is not None:
        return tuple(data.camera_slots.values())
    return manifest.cameras if data.cameras is None else data.cameras


def check_data_matches(config: PiStarRECAPConfig, manifest: Manifest) -> None:
    """UsageError, naming both numbers and the key, where the shards cannot feed this config. Needs no process group."""
    for key, width, name in (
        ("max_action_dim", config.max_action_dim, "action_dim"),
        ("max_state_dim", config.max_state_dim, "state_dim"),
    ):
        dims = getattr(manifest, name)
        if dims > width:
            raise UsageError(
                f"{key}: {width} is narrower than the shards' {name} of {dims}; raise it to at least {dims}"
            )
    _check_cameras(config, manifest)
    if config.value.reward == "environment" and not manifest.has_rewards:
        raise UsageError(
            "value.reward: environment needs recorded rewards and not every shard has them; use sparse_time"
        )
    _check_windows(config, manifest)


def _check_cameras(config: PiStarRECAPConfig, manifest: Manifest) -> None:
    key = "data.cameras" if config.data.camera_slots is None else "data.camera_slots"
    cameras = [camera for camera in camera_slots(config, manifest) if camera is not None]
    unknown = [camera for camera in cameras if camera not in manifest.cameras]
    if unknown:
        there = ", ".join(manifest.cameras)
        raise UsageError(f"{key}: the shards have no camera '{unknown[0]}'; they have {there}")
    if not cameras or len(set(cameras)) < len(cameras):
        raise UsageError(f"{key}: {cameras} must name at least one camera and none twice")


def _check_windows(config: PiStarRECAPConfig, manifest: Manifest) -> None:
    chunk, width, horizon = config.chunk_size, manifest.action_width, manifest.td_horizon
    if chunk > width:
        raise UsageError(
            f"chunk_size: {chunk} is more than the {width} frames of action stored per sample; lower it to {width} or "
            f"import the data again with --chunk-size {chunk}"
        )
    if not config.learns_by_td:
        return
    # Q reads chunk_size actions: a longer window would be judged by actions it is not shown.
    if horizon > chunk:
        raise UsageError(
            f"chunk_size: {chunk} is less than the shards' TD window of {horizon} frames; raise it to {horizon} or "
            f"import the data again with --chunk-size {chunk}"
        )
    if horizon < chunk and config.iql.horizon == "chunk_size":
        raise UsageError(
            f"chunk_size: {chunk} differs from the shards' TD window of {horizon} frames; set chunk_size={horizon}, or "
            f"iql.horizon=manifest to train the critics on {horizon} frames"
        )
    if not manifest.has_next:
        raise UsageError(
            f"training.stage: {config.training.stage} trains critics by TD, and the shards hold no next observations; "
            "import them again without --no-next"
        )
