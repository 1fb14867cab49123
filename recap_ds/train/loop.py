"""The training loop.

All that a run has to remember is ``Progress``, the engine's tiles, the shadows and the advantage ring; the data stream
is a function of ``next_slot``. So an interrupted run continues as if it had not been.
"""

from dataclasses import asdict, replace
from typing import Any

from recap_ds.checkpoint.agreement import on_main
from recap_ds.checkpoint.resume import find_checkpoint, load_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.loader import BatchLoader, build_train_loader
from recap_ds.distributed.flags import FlagExchange, StepFlags
from recap_ds.distributed.runtime import accelerator_is_cpu
from recap_ds.errors import RunStopped, UsageError
from recap_ds.train.evaluation import HeldOutEvaluation
from recap_ds.train.gate import GATES
from recap_ds.train.logbook import Logbook
from recap_ds.train.progress import Progress
from recap_ds.train.reporting import Figures, announce, finish, say_stopped
from recap_ds.train.rollback import roll_back
from recap_ds.train.session import Session
from recap_ds.train.skips import count_skipped
from recap_ds.train.step import take_step

# Damage is judged over at least this many samples, so that one early hit does not end a long run.
MIN_SAMPLES_FOR_DAMAGE = 1000


def train(session: Session) -> dict[str, Any]:
    """Train to the end and return the summary. Collective: every rank must call."""
    plan, config = session.plan, session.plan.config
    progress = resume(session)
    held_out = HeldOutEvaluation(session)
    settings = config.model_dump(mode="json")
    logbook = Logbook(plan.run, config.logging, config.training.num_training_steps, settings, plan.info.is_main)
    with logbook, session.watch.telling():
        progress.wandb_id = on_main(session.runtime, lambda: logbook.open(progress.step, progress.wandb_id))
        announce(session, logbook, progress, held_out)
        saver = build_saver(session, progress, logbook)
        evaluation = take_steps(session, progress, held_out, logbook, saver)
        session.watch.mark("closing the logs")
    return finish(session, progress, evaluation)


def take_steps(
    session: Session, progress: Progress, held_out: HeldOutEvaluation, logbook: Logbook, saver: CheckpointSaver
) -> dict[str, float]:
    """From ``progress`` to the last step; returns the evaluation there. RunStopped where the run is asked to stop.

    Collective: every rank must call.
    """
    plan, config, watch = session.plan, session.plan.config, session.watch
    num_steps = config.training.num_training_steps
    # A line at every save, so that what a checkpoint forgets is on paper and a resumed run's lines are the same.
    log_every = (config.logging.every_steps, config.checkpoint.save_every_steps, config.evaluation.every_steps)
    figures, batches = Figures(session, logbook), iter(build_loader(session, progress))
    evaluation: dict[str, float] = {}
    stop = 0
    with FlagExchange() as flags:
        while progress.step < num_steps and not progress.gate.gives_up(config):
            watch.mark(f"step {progress.step + 1}")
            agreed = flags.exchange(StepFlags(stop=watch.requests.poll(), writing=saver.writing))
            saver.advance(bool(agreed.writing))
            if stop := agreed.stop:
                break
            figures.times.start()
            micro_batches = [next(batches) for _ in range(plan.sizes.accumulation)]
            figures.times.data_ready()
            last_step = progress.step + 1 == num_steps
            log_now = last_step or any((progress.step + 1) % every == 0 for every in log_every)

            result = take_step(session, progress.step, micro_batches, figures.metrics, with_group_norms=log_now)
            progress.step += 1
            progress.next_slot += plan.sizes.total
            progress.samples_seen += plan.sizes.total
            figures.end_step(result)
            if count_skipped(session, progress, logbook, micro_batches, result):
                roll_back(session, progress, logbook, saver)
                figures.clear()
                batches = iter(build_loader(session, progress))
                continue

            if log_now:
                figures.write(progress)
                check_damage(session, progress)
            improved, gate_before = False, replace(progress.gate)
            if held_out.num_samples and (last_step or progress.step % config.evaluation.every_steps == 0):
                evaluation = held_out.run()
                logbook.write(progress.step, evaluation)
                improved = judge(progress, config, evaluation, logbook)
                last_step |= progress.gate.gives_up(config)
            if last_step or improved or progress.step % config.checkpoint.save_every_steps == 0:
                saved = save(session, progress, saver, best=improved, last=last_step)
                if improved and not saved:
                    progress.gate = gate_before  # no checkpoint has it: the next better one than before is the best
        saver.finish()
    if stop:
        figures.write(progress)  # what they hold is lost with the process
        if saver.newest_step != progress.step:
            save(session, progress, saver, best=False, last=True)
        raise RunStopped(say_stopped(session, progress, logbook, stop))
    if held_out.num_samples and not evaluation:
        # Stopped between the last save and the summary: it was logged, but nobody remembers it.
        evaluation = held_out.run()
    return evaluation


def build_loader(session: Session, progress: Progress) -> BatchLoader:
    """This rank's micro-batches of the steps that are left."""
    plan = session.plan
    return build_train_loader(
        plan.dataset,
        plan.config,
        plan.sizes,
        plan.info.rank,
        start_slot=progress.next_slot,
        num_steps=plan.config.training.num_training_steps - progress.step,
        pin_memory=not accelerator_is_cpu(),
    )


def resume(session: Session) -> Progress:
    """Continue from the newest checkpoint that verifies, or begin. Collective: every rank must call."""
    plan, runtime = session.plan, session.runtime
    session.watch.mark("resuming")
    newest = find_checkpoint(plan.run.checkpoints, runtime)
    progress = Progress()
    if newest is not None:
        state, tensors = load_checkpoint(newest, runtime=runtime, engine=session.engine, shadows=session.shadows)
        progress = Progress.restore(state)
        session.load_tensors(tensors)
    on_main(runtime, lambda: plan.run.forget_after(progress.step))
    return progress


def build_saver(session: Session, progress: Progress, logbook: Logbook) -> CheckpointSaver:
    """Collective: every rank must call."""
    return CheckpointSaver(
        session.plan.run.checkpoints,
        runtime=session.runtime,
        engine=session.engine,
        shadows=session.shadows,
        keep=session.plan.config.checkpoint,
        newest_step=progress.step or None,
        say=logbook.say,
    )


def save(session: Session, progress: Progress, saver: CheckpointSaver, best: bool, last: bool) -> bool:
    """False where it failed and training goes on. Collective: every rank must call."""
    session.watch.mark(f"saving step {progress.step}")
    return saver.save(progress.step, asdict(progress), session.tensors(), best=best, last=last)


def check_damage(session: Session, progress: Progress) -> None:
    data, run = session.plan.config.data, session.plan.run
    seen = max(progress.samples_seen, MIN_SAMPLES_FOR_DAMAGE)
    if progress.replaced_samples > data.max_damaged_fraction * seen:
        raise UsageError(
            f"data.shards: {progress.replaced_samples} of {progress.samples_seen} samples were damaged, more than "
            f"data.max_damaged_fraction={data.max_damaged_fraction}; they are listed in {run.damaged}. Find them all "
            f"with 'recap-ds shards verify {data.shards}'"
        )


def judge(progress: Progress, config: PiStarRECAPConfig, evaluation: dict[str, float], logbook: Logbook) -> bool:
    """True = the best evaluation so far by ``evaluation.gate``, which ``progress`` then remembers."""
    gate = GATES[config.evaluation.gate]
    if gate.metric not in evaluation:
        logbook.say(f"warning: evaluation.gate={config.evaluation.gate} cannot be had from these held-out samples")
    improved = progress.gate.judge(config, evaluation)
    if progress.gate.gives_up(config):
        logbook.say(
            f"stopping at step {progress.step}: {gate.metric} was best {progress.gate.evaluations_since_best} "
            f"evaluations ago, at {progress.gate.best:.4f}"
        )
    return improved
