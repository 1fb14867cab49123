"""Held-out episodes: never all or none of a task's, and what growing data changes."""

import numpy as np
import pytest

from recap_ds.data.draws import identity_of
from recap_ds.data.split import held_out_episodes


def rank_of(name: str) -> float:
    """In [0, 1)."""
    return identity_of("held-out", name) / 2.0**64


def names_of(task: int, number: int) -> list[str]:
    return [f"task{task}/{i}" for i in range(number)]


def held_out_names(names: list[str], fraction: float, task: int = 0) -> set[str]:
    held_out = held_out_episodes(names, np.full(len(names), task), fraction)
    return {name for name, out in zip(names, held_out, strict=True) if out}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_every_task_of_two_episodes_or_more_keeps_and_holds_out_some(fraction):
    sizes = [1 + i % 7 for i in range(140)]
    names = [name for task, size in enumerate(sizes) for name in names_of(task, size)]
    task = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(len(names))
    held_out = np.empty(len(names), bool)
    held_out[order] = held_out_episodes([names[i] for i in order], task[order], fraction)
    for number, size in enumerate(sizes):
        num_out = int(held_out[task == number].sum())
        assert num_out == 0 if size == 1 else 1 <= num_out < size
    ranks = np.array([rank_of(name) for name in names])
    for number, size in enumerate(sizes):
        mine, below = task == number, ranks[task == number] < fraction
        if 0 < below.sum() < size:
            np.testing.assert_array_equal(held_out[mine], below)
        elif size > 1:
            extreme = ranks[mine].argmin() if not below.any() else ranks[mine].argmax()
            assert held_out[mine][extreme] == (not below.any())


def test_a_fraction_of_zero_holds_out_nothing():
    assert not held_out_episodes(names_of(0, 50), np.zeros(50, int), 0.0).any()


def test_the_fraction_of_many_tasks_is_the_one_asked_for():
    """Floor included: with 40 episodes a task, one in 68 tasks has no hash below 0.1."""
    task = np.repeat(np.arange(50), 40)
    held_out = held_out_episodes([f"{t}/{i}" for i, t in enumerate(task)], task, 0.1)
    assert abs(held_out.sum() - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)


# Tasks whose two first episodes are both below 0.1: one is kept all the same.
KEPT = {task for task in range(400) if max(map(rank_of, names_of(task, 2))) < 0.1}


def test_as_a_task_grows_no_episode_goes_from_training_to_held_out():
    """From two episodes on, one by one; the exception, one kept though below the fraction, is the next test's."""
    went_to_training = 0
    for task in set(range(40)) - KEPT:
        names = names_of(task, 30)
        before = held_out_names(names[:2], 0.1, task)
        for size in range(3, 31):
            now = held_out_names(names[:size], 0.1, task)
            assert now - before <= {names[size - 1]}, "only what is new may be held out anew"
            went_to_training += len(before - now)
            before = now
        below = {name for name in names if rank_of(name) < 0.1}
        assert now == below or not below
    assert went_to_training > 0, "or the floor was never passed on"


def test_an_episode_kept_because_a_task_must_keep_one_is_held_out_later():
    assert 0 < len(KEPT) < 20
    names = names_of(min(KEPT), 30)
    assert len(held_out_names(names[:2], 0.1)) == 1
    assert held_out_names(names, 0.1) == {name for name in names if rank_of(name) < 0.1} >= set(names[:2])


def test_a_single_episode_is_kept_until_there_is_a_second():
    assert not any(held_out_names(names_of(task, 1), 0.5) for task in range(20))
    assert all(len(held_out_names(names_of(task, 2), 0.5)) == 1 for task in range(20))
