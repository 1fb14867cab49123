"""Beginning a run with the weights of another, as every RECAP iteration begins with the pre-trained ones.

What is taken is the VLM, its adapter, and every head that both have; other heads begin at random. Optimizer, data order
and step count begin anew: going on with a run is ``resume``, and needs nothing of this.
"""

from pathlib import Path
from typing import NamedTuple

from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.checkpoint.on_demand import export_of
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import UsageError
from recap_ds.files.records import file_problems
from recap_ds.files.tensor_reader import TensorFileReader
from recap_ds.models.building import Builder
from recap_ds.models.export_format import CONFIG_NAME, VLM_NAME, ExportRecord, head_file
from recap_ds.models.export_weights import fill_adapter, fill_from_file
from recap_ds.models.pi_joint import INDICATOR_NAME
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.recipe import load_config

KEY = "training.start_from"


class StartPoint(NamedTuple):
    export: Path
    record: ExportRecord
    # Tensors of its expert that say nothing and that the run's has no place for.
    left_out: tuple[str, ...] = ()

    @property
    def vlm(self) -> Path:
        """Folder that the VLM is read from while the policy is built."""
        return self.export / VLM_NAME


def find_start(config: PiStarRECAPConfig, info: RankInfo) -> StartPoint | None:
    """What ``training.start_from`` names; a run or checkpoint is exported once. UsageError where it does not fit."""
    if config.training.start_from is None:
        return None
    try:
        export = export_of(config.training.start_from, info)
        record = ExportRecord.load(export)
        left_out = _left_out(export, record, config)
    except UsageError as error:
        raise UsageError(f"{KEY}: {error}") from None
    if record.vlm_is_plain_transformers is None:
        raise UsageError(f"{KEY}: {export} holds an adapter alone; consolidate without --adapter-only")
    if record.adapter == "separate" and not config.lora.enabled:
        raise UsageError(f"{KEY}: {export} has an adapter; set lora.enabled=true, or consolidate with --merge")
    return StartPoint(export, record, left_out)


def _left_out(export: Path, record: ExportRecord, config: PiStarRECAPConfig) -> tuple[str, ...]:
    """The indicator's vectors, where the run tells it in words and they are zero, as in published weights."""
    if "action_expert" not in config.heads or "action_expert" not in record.heads:
        return ()
    ours, theirs = config.model, load_config(export / CONFIG_NAME).model
    if ours.action_expert != theirs.action_expert or ours.advantage_conditioning == theirs.advantage_conditioning:
        return ()
    if ours.advantage_conditioning == "text":
        vectors = TensorFileReader(export / head_file("action_expert")).source(INDICATOR_NAME)
        if not vectors.read().any():
            return (INDICATOR_NAME,)
    raise UsageError(
        f"{export} has learned to be told its advantage as {theirs.advantage_conditioning}; "
        f"set model.advantage_conditioning={theirs.advantage_conditioning}"
    )


def check_start(start: StartPoint, runtime: Runtime) -> None:
    """Rank 0 reads every byte once; UsageError where one changed. Collective: every rank must call."""
    if problems := on_main(runtime, lambda: file_problems(start.export, start.record.files)):
        raise UsageError(f"{KEY}: {start.export}: {problems[0]}; copy or consolidate the export again")


def fill_heads(start: StartPoint, policy: PiStarRECAPPolicy, builder: Builder, runtime: Runtime) -> None:
    """Adapter and heads into a policy just built, before its engine. Collective: every rank must call."""
    try:
        on_every_rank(runtime, lambda: _fill(start, policy, builder))
    except UsageError as error:
        raise UsageError(f"{KEY}: {error}") from None


def _fill(start: StartPoint, policy: PiStarRECAPPolicy, builder: Builder) -> None:
    if start.record.adapter == "separate":
        fill_adapter(policy.vlm.network, start.export, builder)
    # Not the target critic: it begins as a copy of the critic, whatever that begins with (``Shadow``).
    for head in ("action_expert", "critic"):
        if head in start.record.heads and head in policy.config.heads:
            fill_from_file(policy.get_submodule(head), start.export / head_file(head), builder, start.left_out)
