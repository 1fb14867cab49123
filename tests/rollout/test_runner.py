"""Scheduling: every plan is played once, rows are never shared, and batches are as full as they can be."""

import numpy as np
import pytest

from recap_ds.config import CollectConfig
from recap_ds.rollout.corrector import ScriptedCorrector
from recap_ds.rollout.episode import EpisodePlan, PlayRules
from recap_ds.rollout.player import Player
from recap_ds.rollout.requests import Decision
from recap_ds.rollout.runner import run_episodes, share_of_rank
from tests.rollout.line_world import LineWorld


class LocalWorkers:
    """``Workers`` without processes: answers wait until they are received, one at a time or all together."""

    def __init__(self, num_workers, all_at_once):
        rules = PlayRules(CollectConfig(), seed=0)
        worlds = [LineWorld() for _ in range(num_workers)]
        self._players = [Player(world, rules, ScriptedCorrector(world, rules.collect)) for world in worlds]
        self._answers, self._all_at_once = {}, all_at_once

    def __len__(self):
        return len(self._players)

    def begin(self, worker, plan):
        self._answers[worker] = self._players[worker].begin(plan)

    def play(self, worker, actions, value):
        self._answers[worker] = self._players[worker].play(actions, value)

    def receive(self, busy):
        ready = list(busy) if self._all_at_once else [busy[-1]]
        return {worker: self._answers.pop(worker) for worker in ready}


def plans(count, **fields):
    return [EpisodePlan(n, seed=0, task="go", prompt="go", **fields) for n in range(count)]


def run(num_workers, batch_size=4, all_at_once=True, count=9, **fields):
    batches = []

    def decide(requests):
        batches.append([request.row for request in requests])
        # Each episode is given a speed of its own, and a value that says where it is.
        return [Decision(np.full((2, 1), 0.5 + r.number / 20), -0.1 * r.frame) for r in requests]

    workers = LocalWorkers(num_workers, all_at_once)
    return list(run_episodes(plans(count, **fields), workers, decide, batch_size)), batches


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("all_at_once", [True, False])
def test_every_episode_is_played_once_and_the_same(num_workers, all_at_once):
    rollouts, batches = run(num_workers, all_at_once=all_at_once)
    assert sorted(rollout.played.plan.number for rollout in rollouts) == list(range(9))
    assert all(len(set(rows)) == len(rows) <= num_workers for rows in batches)
    alone, _ = run(1)
    frames = {r.played.plan.number: r.played.num_frames for r in alone}
    assert {r.played.plan.number: r.played.num_frames for r in rollouts} == frames
    assert len(set(frames.values())) > 2


def test_batches_are_full_while_there_is_work():
    _, batches = run(4, count=40)
    full = [len(rows) == 4 for rows in batches]
    assert sum(full) > 0.8 * len(full)


def test_values_are_kept_where_the_policy_looked():
    (rollout, *_), _ = run(1)
    assert rollout.played.num_frames == 10
    np.testing.assert_allclose(rollout.values, [(0, 0.0), (2, -0.2), (4, -0.4), (6, -0.6), (8, -0.8)])


def test_the_expert_alone_needs_nobody_to_decide():
    rollouts = list(run_episodes(plans(5, mode="expert"), LocalWorkers(2, True), None, 4))
    assert len(rollouts) == 5 and all(r.played.success and not r.values for r in rollouts)


@pytest.mark.parametrize(("num_workers", "world"), [(1, 1), (2, 1), (3, 2), (4, 3), (2, 64)])
def test_ranks_share_the_episodes_evenly_and_their_rows_differ(num_workers, world):
    shares = [share_of_rank(plans(50), num_workers, rank, world) for rank in range(world)]
    assert sorted(plan.number for share in shares for plan in share) == list(range(50))
    assert max(map(len, shares)) - min(map(len, shares)) <= num_workers
    for share in shares:
        for first in range(0, len(share), num_workers):
            rows = [plan.number % 4 for plan in share[first : first + num_workers]]
            assert len(set(rows)) == len(rows)
