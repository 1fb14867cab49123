"""What a run says of itself: its first lines, the figures of a step, its summary."""

from dataclasses import asdict
from typing import Any

from recap_ds.checkpoint.agreement import on_main
from recap_ds.checkpoint.layout import step_name
from recap_ds.distributed.build import whole_numel
from recap_ds.train.evaluation import HeldOutEvaluation
from recap_ds.train.logbook import Logbook, finite_or_none
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.progress import Progress
from recap_ds.train.run_folder import RunFolder
from recap_ds.train.session import Session
from recap_ds.train.step import StepResult
from recap_ds.train.stopping import describe
from recap_ds.train.timing import StepTimes
from recap_ds.train.utilisation import Utilisation


class Figures:
    """Of the steps since the last line."""

    def __init__(self, session: Session, logbook: Logbook) -> None:
        self._session, self._logbook = session, logbook
        self._utilisation = Utilisation.of(session)
        self.clear()

    def clear(self) -> None:
        """Begin anew, without a line."""
        plan, device = self._session.plan, self._session.runtime.device
        self.metrics = StepMetrics(plan.config, plan.tasks, device, plan.corrections)
        self.times = StepTimes(device)
        self._last: StepResult | None = None  # None = there was no step since

    def end_step(self, result: StepResult) -> None:
        self.times.stop(self._session.plan.sizes.total)
        self._logbook.tick()
        self._last = result

    def write(self, progress: Progress) -> None:
        """A line, unless there is nothing to say. Collective: every rank must call."""
        if self._last is None:
            return
        result, self._last = self._last, None
        figures = self.metrics.summarise(result.batch, result.output)
        progress.replaced_samples += int(figures["data/replaced_samples"])
        times = self._utilisation.add_to(self.times.summarise())
        self._logbook.write(progress.step, figures | step_figures(self._session, progress, result) | times)


def step_figures(session: Session, progress: Progress, result: StepResult) -> dict[str, float]:
    groups = session.engine.optimizer.param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    epochs = session.plan.dataset.order.epochs(progress.next_slot)
    # Measured where a line is due; an unforeseen one, at a stop, goes without.
    norms = {} if result.group_norms is None else dict(zip(rates, result.group_norms.tolist(), strict=True))
    return {
        # The head's: the VLM follows at its own pace.
        "train/lr": rates.get("action_expert", rates.get("critic")),
        **{f"train/lr/{name}": rate for name, rate in rates.items()},
        "train/grad_norm": float(result.grad_norm),
        **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
        "train/skipped_steps": progress.skipped_steps,
        **({} if session.spikes is None else {"train/spikes": progress.spikes, "train/rollbacks": progress.rollbacks}),
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


def say_stopped(session: Session, progress: Progress, logbook: Logbook, stop: int) -> str:
    """The line of a run that was asked to stop, by ``StepFlags.stop``, and has saved."""
    run, total = session.plan.run, session.plan.config.training.num_training_steps
    place = run.checkpoints / step_name(progress.step)
    text = (
        f"stopped at step {progress.step} of {total} ({describe(stop)}): {place}; the same command goes on from there"
    )
    logbook.say(text)
    return text


def finish(session: Session, progress: Progress, evaluation: dict[str, float]) -> dict[str, Any]:
    """Write and return the summary of a finished run."""
    summary = {
        "run": str(session.plan.run.path),
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "skipped_steps": progress.skipped_steps,
        "spikes": progress.spikes,
        "rollbacks": progress.rollbacks,
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
