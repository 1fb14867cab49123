"""What to do after looking at a run: the commands that follow its state and its stage."""

import shlex

from recap_ds.report.run_record import RunRecord
from recap_ds.report.state import State


def next_steps(record: RunRecord, state: State) -> list[str]:
    """Commands or words, in order."""
    run, shards = shlex.quote(str(record.path)), shlex.quote(str(record.setting("data.shards") or "SHARDS"))
    match state.kind:
        case "running":
            return [f"recap-ds report {run}   # again, later"]
        case "failed":
            return [f"read {record.path / 'failures'}: tracebacks of every rank", _again(record)]
        case "stopped" | "empty":
            return [_again(record)]
    best = "best" if record.checkpoints.best is not None else "latest"
    checkpoint = f"--checkpoint {run}/{best}"
    if record.stage == "critic":
        return [
            f"deepspeed launch/label.py {checkpoint} --shards {shards} --tag TAG",
            f"recap-ds labels show {shards} --tag TAG",
        ]
    if not any(evaluation.rollouts for evaluation in record.evaluations):
        return [f"deepspeed launch/evaluate.py {checkpoint} --env ENV --episodes 50"]
    return [f"recap-ds collect {checkpoint} --env ENV --out SHARDS --episodes 50"]


def _again(record: RunRecord) -> str:
    latest = record.checkpoints.latest
    where = f"from step {latest:,}" if latest is not None else "from the beginning: no checkpoint was saved yet"
    return f"start the same command again: it goes on {where}"
