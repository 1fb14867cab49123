"""The training loop.

All that a run has to remember is ``Progress``, the engine's tiles, the shadows and the advantage ring; the data stream
is a function of ``next_slot``. So an interrupted run continues as if it had not been.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from recap_ds.checkpoint.agreement import on_main
from recap_ds.checkpoint.resume import find_checkpoint, load_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.loader import BatchLoader, build_train_loader
from recap_ds.distributed.build import whole_numel
from recap_ds.distributed.flags import FlagExchange, StepFlags
from recap_ds.distributed.runtime import accelerator_is_cpu
from recap_ds.errors import RunFailed, UsageError
from recap_ds.train.evaluation import HeldOutEvaluation
from recap_ds.train.gate import GATES, GateState
from recap_ds.train.logbook import Logbook, finite_or_none
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.run_folder import RunFolder
from recap_ds.train.session import Session
from recap_ds.train.step import StepResult, record_skipped, take_step
from recap_ds.train.timing import StepTimes
from recap_ds.train.utilisation import Utilisation

# Damage is judged over at least this many samples, so that one early hit does not end a long run.
MIN_SAMPLES_FOR_DAMAGE = 1000


@dataclass
class Progress:
    """What a checkpoint remembers of the loop; plain JSON."""

    step: int = 0  # optimizer steps taken, applied or skipped
    next_slot: int = 0
    samples_seen: int = 0
    replaced_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    gate: GateState = field(default_factory=GateState)
    wandb_id: str | None = None

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Progress":
        """From a checkpoint; those of before there were gates knew the loss alone."""
        gate = state.get("gate") or {"best": state.get("best_loss")}
        others = {name: value for name, value in state.items() if name not in ("gate", "best_loss")}
        return cls(**others, gate=GateState(**gate))


def train(session: Session) -> dict[str, Any]:
    """Train to the end and return the summary. Collective: every rank must call."""
    plan, config = session.plan, session.plan.config
    progress = resume(session)
    held_out = HeldOutEvaluation(session)
    settings = config.model_dump(mode="json")
    with Logbook(plan.run, config.logging, config.training.num_training_steps, settings, plan.info.is_main) as logbook:
        progress.wandb_id = on_main(session.runtime, lambda: logbook.open(progress.step, progress.wandb_id))
        announce(session, logbook, progress, held_out)
        saver = build_saver(session, progress, logbook)
        evaluation = take_steps(session, progress, held_out, logbook, saver)
    return finish(session, progress, evaluation)


def take_steps(
    session: Session, progress: Progress, held_out: HeldOutEvaluation, logbook: Logbook, saver: CheckpointSaver
) -> dict[str, float]:
    """From ``progress`` to the last step; returns the evaluation there. Collective: every rank must call."""
    plan, config = session.plan, session.plan.config
    num_steps = config.training.num_training_steps
    # A line at every save, so that what a checkpoint forgets is on paper and a resumed run's lines are the same.
    log_every = (config.logging.every_steps, config.checkpoint.save_every_steps, config.evaluation.every_steps)
    metrics = StepMetrics(config, plan.tasks, session.runtime.device)
    times, utilisation = StepTimes(session.runtime.device), Utilisation.of(session)
    batches = iter(build_loader(session, progress))
    flags = FlagExchange()
    evaluation: dict[str, float] = {}
    while progress.step < num_steps and not progress.gate.gives_up(config):
        times.start()
        micro_batches = [next(batches) for _ in range(plan.sizes.accumulation)]
        times.data_ready()
        last_step = progress.step + 1 == num_steps
        log_now = last_step or any((progress.step + 1) % every == 0 for every in log_every)

        result = take_step(session, progress.step, micro_batches, metrics, with_group_norms=log_now)
        progress.step += 1
        progress.next_slot += plan.sizes.total
        progress.samples_seen += plan.sizes.total
        count_skipped(session, progress, micro_batches, result)
        times.stop(plan.sizes.total)
        logbook.tick()
        saver.advance(bool(flags.exchange(StepFlags(writing=saver.writing)).writing))

        if log_now:
            figures = metrics.summarise(result.batch, result.output)
            progress.replaced_samples += int(figures["data/replaced_samples"])
            check_damage(session, progress)
            figures |= step_figures(session, progress, result) | utilisation.add_to(times.summarise())
            logbook.write(progress.step, figures)
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
    flags.close()
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
    newest = find_checkpoint(plan.run.checkpoints, runtime)
    progress = Progress()
    if newest is not None:
        state, tensors = load_checkpoint(newest, runtime=runtime, engine=session.engine, shadows=session.shadows)
        progress = Progress.restore(state)
        if session.ring is not None:
            session.ring.load_state_dict(tensors)
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
    ring = {} if session.ring is None else session.ring.state_dict()
    return saver.save(progress.step, asdict(progress), ring, best=best, last=last)


def count_skipped(session: Session, progress: Progress, micro_batches: list, result: StepResult) -> None:
    """NaN or inf anywhere skips the step on every rank; too many in a row end the run."""
    if result.applied:
        progress.skipped_in_a_row = 0
        return
    record_skipped(session, progress.step, micro_batches, result)
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    limit = session.plan.config.training.max_skipped_steps
    if progress.skipped_in_a_row >= limit:
        raise RunFailed(
            f"step {progress.step}: {limit} optimizer steps in a row had gradients that are not finite; their "
            f"samples are in {session.plan.run.skipped}. Lower the learning rate or check them; checkpoints are safe"
        )


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


def step_figures(session: Session, progress: Progress, result: StepResult) -> dict[str, float]:
    groups = session.engine.optimizer.param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    epochs = session.plan.dataset.order.epochs(progress.next_slot)
    norms = dict(zip(rates, result.group_norms.tolist(), strict=True))
    return {
        # The head's: the VLM follows at its own pace.
        "train/lr": rates.get("action_expert", rates.get("critic")),
        **{f"train/lr/{name}": rate for name, rate in rates.items()},
        "train/grad_norm": float(result.grad_norm),
        **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
        "train/skipped_steps": progress.skipped_steps,
        "data/samples_seen": progress.samples_seen,
        "data/replaced_total": progress.replaced_samples,
        **{f"data/epochs/{name}": number for name, number in epochs.items()},
    }


def announce(session: Session, logbook: Logbook, progress: Progress, held_out: HeldOutEvaluation) -> None:
    plan, config, sizes = session.plan, session.plan.config, session.plan.sizes
    counts = {
        name: sum(whole_numel(parameter) for parameter in child.parameters())
        for name, child in session.engine.module.named_children()
    }
    logbook.say(plan.precision.text)
    logbook.say(f"parameters: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    logbook.say(
        f"batch: {sizes.total} = {sizes.micro} x {sizes.accumulation} accumulation x {sizes.world} ranks; "
        f"{held_out.num_samples} held-out samples"
    )
    if session.engine.module.vlm.random_init and not progress.step:
        fate = "frozen: nothing trains it" if config.model.freeze_vlm else "untrained: heads begin on empty features"
        logbook.say(f"warning: the VLM's weights are random and {fate}")
    logbook.say(f"{'continuing' if progress.step else 'starting'} {plan.run.path} at step {progress.step}")


def finish(session: Session, progress: Progress, evaluation: dict[str, float]) -> dict[str, Any]:
    """Write and return the summary of a finished run."""
    summary = {
        "run": str(session.plan.run.path),
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "skipped_steps": progress.skipped_steps,
        "replaced_samples": progress.replaced_samples,
        "stopped_early": progress.step < session.plan.config.training.num_training_steps,
        "gate": asdict(progress.gate),
        "evaluation": finite_or_none(evaluation),
    }
    on_main(session.runtime, lambda: close_run(session.plan.run, summary))
    return summary


def close_run(run: RunFolder, summary: dict[str, Any]) -> None:
    """Rank 0 only."""
    run.finish(summary)
    run.unlock()
