"""Where metrics go: metrics.jsonl always, wandb where wanted, a progress bar or plain lines. Other ranks are silent."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recap_ds.config import LoggingConfig
from recap_ds.errors import RunStopped, UsageError
from recap_ds.files.lines import LineFile
from recap_ds.train.run_folder import RunFolder

SHOWN = ("loss", "policy_loss", "q_loss", "v_loss")


class Logbook:
    """A context manager around ``open`` and all that follows; left by an error, the run counts as failed in wandb."""

    def __init__(
        self, run: RunFolder, logging: LoggingConfig, total_steps: int, settings: dict[str, Any], is_main: bool
    ):
        self._run, self._logging, self._settings = run, logging, settings
        self._total_steps = total_steps
        self._is_main = is_main
        self._file = self._bar = self._wandb = None
        self._refused = False  # True = the last line is not in the file yet

    def open(self, step: int, wandb_id: str | None) -> str | None:
        """Start logging after ``step`` steps; returns wandb's run id, by which a later start continues the same run."""
        if not self._is_main:
            return wandb_id
        self._file = LineFile(self._run.metrics)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total_steps, initial=step, unit="step", dynamic_ncols=True)
        mode = wandb_mode(self._logging)
        if mode == "disabled":
            return wandb_id
        import wandb

        try:
            self._wandb = wandb.init(
                project=self._logging.wandb_project,
                entity=self._logging.wandb_entity,
                name=self._run.path.name,
                id=wandb_id,
                resume="allow",
                dir=str(self._run.path),
                mode=mode,
                config=self._settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:  # no network from this machine, or an account it does not know
            raise UsageError(f"logging.wandb: {mode} does not work here ({error}); set logging.wandb=offline") from None
        return self._wandb.id

    def rewind(self, step: int) -> None:
        """Forget the lines after ``step``. wandb cannot, and takes none until the run is past where it was."""
        if not self._is_main:
            return
        self._file.close()
        self._run.forget_after(step)
        self._file = LineFile(self._run.metrics)
        if self._bar is not None:
            self._bar.n = step

    def tick(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics after ``step`` steps."""
        if not self._is_main:
            return
        assert self._file is not None, "the logbook is not open"
        refused = self._file.add(json.dumps({"step": step, **finite_or_none(metrics)}))
        if refused and not self._refused:  # once: a full disk stays full for many lines
            self.say(f"warning: {refused}; its lines are kept until it can be")
        self._refused = refused is not None
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        self._show(step, metrics)

    def say(self, text: str) -> None:
        """One line for people, on rank 0."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            in_order = error_type is None or issubclass(error_type, RunStopped)
            self._wandb.finish(exit_code=0 if in_order else 1)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        for stage in ("train", "eval"):
            shown = {name: metrics[f"{stage}/{name}"] for name in SHOWN if f"{stage}/{name}" in metrics}
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            if not text:
                continue
            if self._bar is not None and stage == "train":
                self._bar.set_postfix_str(text)
            else:
                speed = metrics.get("time/samples_per_second")
                ending = f"  {speed:.1f} samples/s" if speed is not None else ""
                self.say(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {stage}  {text}{ending}")


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def wandb_mode(logging: LoggingConfig) -> str:
    """auto: WANDB_MODE if set, else online where there is an account, else offline."""
    if logging.wandb != "auto":
        return logging.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_account = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())
    return "online" if has_account else "offline"
