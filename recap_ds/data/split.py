"""Which episodes are held out: whole ones, by a hash of their own names, and never all or none of a task's.

An episode is held out where its hash is below ``fraction``: that says nothing of the other episodes, so it stays on its
side whatever is added. Two rules see to tasks of few episodes. A task of at least two that would hold out none holds
out its lowest hash; one that would keep none keeps its highest.

What growing data can change, then: such a lowest hash goes over to training once a new episode is held out in its
place. From training to held out, where a policy that learned from it would be judged by it, go two kinds only: a
task's single episode, when a second joins it, and one that was kept though below ``fraction`` (a chance of fraction^n
in a task of n episodes). Of a part of a data set the lowest hash may be another than of the whole: judge on the shards
that were trained on, or on more.

    E episodes   K tasks
"""

from collections.abc import Sequence

import numpy as np

from recap_ds.data.draws import identity_of


def held_out_episodes(names: Sequence[str], task: np.ndarray, fraction: float) -> np.ndarray:
    """[E] bool, True = held out. ``task`` [E]: the task each episode belongs to."""
    if fraction == 0.0:
        return np.zeros(len(names), bool)
    rank = np.array([identity_of("held-out", name) for name in names], np.uint64)
    held_out = rank < np.uint64(fraction * 2.0**64)
    for number in np.unique(task):
        mine = np.flatnonzero(task == number)
        if held_out[mine].all():
            held_out[mine[rank[mine].argmax()]] = False
        elif not held_out[mine].any() and len(mine) > 1:
            held_out[mine[rank[mine].argmin()]] = True
    return held_out
