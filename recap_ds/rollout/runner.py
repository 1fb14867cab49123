"""Plans in, finished episodes out: keeps every environment busy and gathers what their policies are asked into batches.

What comes of an episode depends on its plan alone. An episode has a fixed row of the padded batch, so that not even the
last bits of its actions depend on which episodes run beside it, on how many environments, or on which rank.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode
from recap_ds.rollout.requests import Decision, Request
from recap_ds.rollout.workers import Workers

# Answers to requests, in their order; their rows are distinct.
Decide = Callable[[Sequence[Request]], Sequence[Decision]]


class Rollout(NamedTuple):
    played: PlayedEpisode
    # (frame, value) wherever the policy looked; empty without a critic.
    values: list[tuple[int, float]]


def share_of_rank(plans: Sequence[EpisodePlan], num_workers: int, rank: int, world: int) -> list[EpisodePlan]:
    """This rank's: ``num_workers`` plans in a row at a time, so that those who play side by side have other rows."""
    return [plan for number, plan in enumerate(plans) if number // num_workers % world == rank]


def run_episodes(
    plans: Sequence[EpisodePlan], workers: Workers, decide: Decide | None, batch_size: int
) -> Iterator[Rollout]:
    """Every episode as it ends, in no particular order. ``decide`` may be None where the expert alone acts."""
    waiting = list(plans)
    idle = list(range(len(workers)))
    playing: dict[int, EpisodePlan] = {}
    looks: dict[int, Look] = {}
    values: dict[int, list[tuple[int, float]]] = {}
    while waiting or playing:
        for plan in _startable(waiting, playing, len(idle), batch_size):
            worker = idle.pop()
            waiting.remove(plan)
            playing[worker], values[worker] = plan, []
            workers.begin(worker, plan)
        # The policy is asked when everyone who plays waits for it: batches stay full.
        if thinking := [worker for worker in playing if worker not in looks]:
            for worker, answer in workers.receive(thinking).items():
                if isinstance(answer, Look):
                    looks[worker] = answer
                else:
                    del playing[worker]
                    idle.append(worker)
                    yield Rollout(answer, values[worker])
            continue
        assert decide is not None, "an episode of the expert alone never looks"
        requests = [_request(playing[worker], look, batch_size) for worker, look in looks.items()]
        for (worker, look), decision in zip(looks.items(), decide(requests), strict=True):
            if decision.value is not None:
                values[worker].append((look.frame, decision.value))
            workers.play(worker, decision.actions, decision.value)
        looks = {}


def _startable(
    waiting: Sequence[EpisodePlan], playing: dict[int, EpisodePlan], num_idle: int, batch_size: int
) -> list[EpisodePlan]:
    """The next episodes, at most ``num_idle``, whose rows nobody has."""
    taken = {plan.number % batch_size for plan in playing.values()}
    chosen: list[EpisodePlan] = []
    for plan in waiting:
        if len(chosen) == num_idle:
            break
        if (row := plan.number % batch_size) not in taken:
            taken.add(row)
            chosen.append(plan)
    return chosen


def _request(plan: EpisodePlan, look: Look, batch_size: int) -> Request:
    return Request(
        row=plan.number % batch_size,
        number=plan.number,
        arm=plan.arm,
        frame=look.frame,
        observation=look.observation,
        # What reads it: the curve under a film, and takeovers.
        wants_value=plan.keeps_pictures,
    )
