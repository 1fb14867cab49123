"""Whose images a held-out sample is shown, to find out whether a critic looks: another episode's, of the same task.

A function of the held-out samples alone, so that the shuffled-image gap is the same for every batch size and number of
ranks. Samples come in an order in which the lender is nearly always the one before, so that hardly a sample is read
twice: the samples of a task in rounds, one of each episode, in random places of their episodes. (Neighbours in time
would have about the same value, and swapping their images would show nothing.)

    n held-out samples
"""

from typing import NamedTuple

import numpy as np

from recap_ds.data.draws import Purpose, generator, identity_of
from recap_ds.data.shard_set import ShardSet

# Where the one before does not do, this many samples in a row share a lender from elsewhere.
RUN = 8


class Lending(NamedTuple):
    sample: np.ndarray  # [n] int64 ids, in the order of evaluation
    lender: np.ndarray  # [n] int64 ids, whose images each is shown


def lend_images(shard_set: ShardSet, chosen: np.ndarray, held_out_fraction: float) -> Lending:
    """``chosen`` [n]: ids of held-out samples."""
    task = shard_set.table.task[chosen]
    parts = []
    for number in np.unique(task):
        samples = _in_rounds(shard_set, chosen[task == number])
        parts.append(Lending(samples, _lenders(shard_set, samples, held_out_fraction)))
    if not parts:
        return Lending(chosen, chosen)
    return Lending(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _in_rounds(shard_set: ShardSet, samples: np.ndarray) -> np.ndarray:
    """The first of every episode, then the second of every episode ...; first by hash, not by frame."""
    _, episode = np.unique(shard_set.table.episode[samples], return_inverse=True)
    by_hash = np.argsort(np.array([shard_set.identity(sample) for sample in samples], np.uint64))
    turn = np.empty(len(samples), np.int64)
    for number in range(episode.max() + 1):
        mine = by_hash[episode[by_hash] == number]
        turn[mine] = np.arange(len(mine))
    names = [shard_set.episodes[shard_set.table.episode[sample]] for sample in samples]
    place = np.array([identity_of(name) for name in names], np.uint64)
    return samples[np.lexsort((place, turn))]


def _lenders(shard_set: ShardSet, samples: np.ndarray, held_out_fraction: float) -> np.ndarray:
    """The sample before, the last one for the first; where both are of one episode, some sample of another."""
    episode = shard_set.table.episode[samples]
    before = np.roll(samples, 1)
    alone = np.flatnonzero(shard_set.table.episode[before] == episode)
    if not len(alone):
        return before
    # In rounds, one episode alone can follow itself: the longest.
    others = samples[episode != episode[alone[0]]]
    if not len(others):
        others = _training_samples(shard_set, int(samples[0]), len(samples) // RUN + 1, held_out_fraction)
    lenders = before.copy()
    lenders[alone] = others[alone // RUN % len(others)]
    return lenders


def _training_samples(shard_set: ShardSet, like: int, number: int, held_out_fraction: float) -> np.ndarray:
    """``number`` ids at random, of the task of ``like`` but not held out: every task keeps an episode for training."""
    task = int(shard_set.table.task[like])
    rows = np.flatnonzero(~shard_set.held_out(held_out_fraction) & (shard_set.table.task == task))
    return rows[generator(0, Purpose.IMAGE_LENDER, task).integers(len(rows), size=number)]
