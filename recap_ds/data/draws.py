"""Everything random about the data, as counter-based draws: a pure function of (seed, purpose, place).

Philox is keyed by (seed, purpose) and started at a counter made of the place (a slot, a block, an epoch), so that any
draw can be made at any time, by any process, without the ones before it. That is what makes resume O(1) and the losses
independent of world size, accumulation and worker count. Training and evaluation use different purposes and never share
a draw.

    F flow draws per sample   H chunk_size   A max_action_dim

numpy only; knows no data set and no model.
"""

import hashlib
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from recap_ds.batch import NUM_AUGMENTATION_DRAWS


class Purpose(IntEnum):
    """What a stream of draws is for. The numbers are part of every run's data order: add, never renumber."""

    BLOCK_SOURCES = 1  # place: block
    EPOCH_SHARDS = 2  # place: source, epoch
    WINDOW_SAMPLES = 3  # place: source, epoch, window
    REPLACEMENT = 4  # place: slot, attempt
    FLOW_NOISE = 5  # place: slot
    FLOW_TIME = 6  # place: slot
    INDICATOR_DROPOUT = 7  # place: slot
    AUGMENTATION = 8  # place: slot
    EVALUATION_NOISE = 9  # place: sample identity
    BASELINE_CHOICE = 10
    IMAGE_LENDER = 11  # place: task
    ROLLOUT_NOISE = 12  # place: episode, frame
    STREAM_SHARDS = 13  # place: first slot, stream, epoch


class SampleDraws(NamedTuple):
    noise: np.ndarray  # [F, H, A] float32, standard normal
    time_uniform: np.ndarray  # [F] float64 in [0, 1): the quantile of the flow time, not the time itself
    indicator_dropped: bool
    augmentation: np.ndarray  # [NUM_AUGMENTATION_DRAWS] float32 in [0, 1)


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """The stream of (seed, purpose, place); ``place`` is up to three non-negative integers below 2**64."""
    assert len(place) <= 3, place
    # Word 0 of the counter runs while drawing; the place fills the other three, so streams cannot overlap.
    counter = np.zeros(4, np.uint64)
    counter[1 : 1 + len(place)] = place
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter))


def identity_of(*names: str | int) -> int:
    """64 bits from names: the same in every process, on every machine and whatever else the data set holds."""
    text = "\0".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def training_draws(seed: int, slot: int, shape: tuple[int, int, int], indicator_dropout: float) -> SampleDraws:
    """Draws of a training sample by its slot; ``shape`` is (F, H, A)."""
    return SampleDraws(
        noise=generator(seed, Purpose.FLOW_NOISE, slot).standard_normal(shape, dtype=np.float32),
        time_uniform=generator(seed, Purpose.FLOW_TIME, slot).random(shape[0]),
        indicator_dropped=generator(seed, Purpose.INDICATOR_DROPOUT, slot).random() < indicator_dropout,
        augmentation=generator(seed, Purpose.AUGMENTATION, slot).random(NUM_AUGMENTATION_DRAWS, dtype=np.float32),
    )


def evaluation_noise(seed: int, identity: int, shape: tuple[int, int, int]) -> np.ndarray:
    """[F, H, A] float32 normal noise of a held-out sample: keyed by what the sample is, so checkpoints compare."""
    return generator(seed, Purpose.EVALUATION_NOISE, identity).standard_normal(shape, dtype=np.float32)
