"""Which episodes are missing: a pure function of what is wanted, what is in the shards and which demonstrations failed.

Episode n of a kind is of task n mod (number of tasks). A demonstration that failed is replaced by the next one of its
own task, so that every task has its share however often its expert fails.
"""

import itertools
from collections import Counter

from recap_ds.collect.handover import names_in_shards
from recap_ds.collect.job import DEMO, CollectJob, Kind
from recap_ds.collect.journal import episode_name
from recap_ds.errors import RunFailed
from recap_ds.rollout.episode import EpisodePlan

# Demonstrations that may fail for each that is wanted of a task.
MAX_FAILED_DEMOS_FACTOR = 4


def missing_plans(job: CollectJob, failed_demos: set[int]) -> list[EpisodePlan]:
    """The next ones to play. ``failed_demos``: their plans' numbers."""
    there = names_in_shards(job.out)
    plans = []
    for kind, count in job.goals.items():
        if kind is DEMO:
            taken = {int(name.rpartition("/")[2]) for name in there if name.startswith(f"{job.dataset(kind)}/")}
            failed = {number - kind.offset for number in failed_demos}
            indices = missing_demos(count, len(job.world.tasks), taken, failed)
        else:
            indices = [i for i in range(count) if episode_name(job.dataset(kind), i) not in there]
        plans += [_plan(job, kind, index) for index in indices]
    return plans


def missing_demos(count: int, num_tasks: int, taken: set[int], failed: set[int]) -> list[int]:
    """The lowest indices that are neither taken nor failed, as many of each task as it lacks."""
    chosen: list[int] = []
    for task in range(num_tasks):
        num_missing = len(range(task, count, num_tasks)) - sum(index % num_tasks == task for index in taken)
        still_open = (i for i in itertools.count(task, num_tasks) if i not in taken and i not in failed)
        chosen += itertools.islice(still_open, max(0, num_missing))
    return sorted(chosen)


def check_experts(job: CollectJob, plans: list[EpisodePlan], failed_demos: set[int]) -> None:
    """RunFailed where a task's expert, which is to play again, cannot do it: it would be asked for ever."""
    tasks = list(job.world.tasks)
    failures = Counter(tasks[(number - DEMO.offset) % len(tasks)] for number in failed_demos)
    for position, task in enumerate(tasks):
        wanted = len(range(position, job.goals.get(DEMO, 0), len(tasks)))
        asked_again = any(plan.mode == DEMO.mode and plan.task == task for plan in plans)
        if not asked_again or failures[task] <= MAX_FAILED_DEMOS_FACTOR * (wanted + 1):
            continue
        dataset, env = job.dataset(DEMO), job.world.spec.name
        num_there = sum(name.startswith(f"{dataset}/") for name in names_in_shards(job.out))
        # Other settings may not join what is there already.
        mend = f", under a new --name: '{dataset}' has {num_there} episodes of these settings" if num_there else ""
        raise RunFailed(
            f"--demos {job.goals[DEMO]}: the expert of {env} failed {failures[task]} times at '{task}'; "
            f"give it more time (env.max_steps) or less noise (collect.demo_noise){mend}"
        )


def _plan(job: CollectJob, kind: Kind, index: int) -> EpisodePlan:
    tasks = list(job.world.tasks.items())
    task, known = tasks[index % len(tasks)]
    return EpisodePlan(
        number=kind.offset + index,
        seed=job.seed + kind.offset + index,
        task=task,
        prompt=known.prompt,
        keeps_pictures=True,
        mode=kind.mode,
        stands_in=job.actor is None,
    )
