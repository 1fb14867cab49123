"""Collection: episodes are played, wait in the journal, and become shards of OUT.

The same command goes on where it was stopped, and asked for more episodes it adds those that are missing.
"""

import torch

from recap_ds.collect.handover import Report, take_over, write_waiting
from recap_ds.collect.job import CollectJob, Kind
from recap_ds.collect.journal import Journal, Label, open_journal
from recap_ds.collect.plans import check_experts, missing_plans
from recap_ds.collect.record import CollectionRecord
from recap_ds.collect.tally import Tally, tally_collection
from recap_ds.rollout.episode import EpisodePlan, PlayRules
from recap_ds.rollout.keyboard import PersonLeft
from recap_ds.rollout.runner import run_episodes
from recap_ds.rollout.workers import Workers, count_workers

# Shards are written when so many episodes wait: enough to shuffle, few enough to lie around as raw pictures.
EPISODES_PER_WRITE = 64


def collect(job: CollectJob, device: torch.device, local_world: int, report: Report) -> dict[str, Tally]:
    """Play what is missing and write it; what then is there, by data set.

    A person who closes the window of corrections ends it early. Interrupted, it writes what is finished before it ends;
    killed, that is done when it is called again.
    """
    with open_journal(job.out) as journal:
        record = CollectionRecord(job.out)
        take_over(job, journal, record, report)
        failed_demos: set[int] = set()
        while plans := missing_plans(job, failed_demos):
            check_experts(job, plans, failed_demos)
            try:
                failed_demos |= _play(job, journal, record, plans, device, local_world, report)
            except PersonLeft:
                report("the window was closed; the same command goes on with the episodes that are missing")
                break
            finally:
                write_waiting(job, journal, record, report)
    return tally_collection(job)


def _play(
    job: CollectJob,
    journal: Journal,
    record: CollectionRecord,
    plans: list[EpisodePlan],
    device: torch.device,
    local_world: int,
    report: Report,
) -> set[int]:
    """Returns the numbers of demonstrations that failed: they are not kept."""
    if job.actor is not None:
        job.actor.to(device)
    rules = PlayRules(job.config.collect, job.seed, job.corrector)
    evaluation = job.config.evaluation
    # A person watches one environment.
    num_workers = 1 if job.corrector == "keyboard" else min(count_workers(evaluation, local_world), len(plans))
    kinds = {kind.mode: kind for kind in job.goals}
    decide = None if job.actor is None else job.actor.decide
    failed_demos: set[int] = set()
    with Workers(job.world.settings, rules, num_workers) as workers:
        rollouts = run_episodes(plans, workers, decide, evaluation.rollout_batch_size)
        for done, (played, _) in enumerate(rollouts, start=1):
            kind = kinds[played.plan.mode]
            if played.plan.mode == "expert" and not played.success:
                failed_demos.add(played.plan.number)
            else:
                # Only now: a data set without an episode binds nobody to its settings.
                record.set(job.dataset(kind), job.provenance(kind))
                journal.add(played, _label(job, kind, played.plan), job.provenance(kind))
            if done % EPISODES_PER_WRITE == 0:
                report(f"{done}/{len(plans)} episodes")
                write_waiting(job, journal, record, report)
    return failed_demos


def _label(job: CollectJob, kind: Kind, plan: EpisodePlan) -> Label:
    known = job.world.tasks[plan.task]
    actor = "the scripted expert"
    if job.actor is None and kind.mode != "expert":
        actor = "a mediocre expert"
    elif kind.mode != "expert":
        actor = f"{job.checkpoint} ({job.checkpoint_hash[:12]})"
    if job.corrector == "keyboard":
        actor += ", corrected at the keyboard"
    return Label(
        dataset=job.dataset(kind),
        index=plan.number - kind.offset,
        source=kind.source,
        task=known.name,
        prompt=known.prompt,
        fps=job.world.spec.fps,
        origin=f"{job.world.spec.name} seed {plan.seed} by {actor}",
    )
