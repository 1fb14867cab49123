"""``state.json``: everything about a checkpoint that is not a tensor, and the check that its files are whole."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from recap_ds.checkpoint.layout import STATE_NAME, parse_step, rank_file_name
from recap_ds.checkpoint.tile_file import TileReader
from recap_ds.errors import UsageError
from recap_ds.files.records import CheckedRecord, FileRecord, file_problems


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupSettings(_Part):
    name: str
    lr: float
    weight_decay: float


class ParameterRecord(_Part):
    shape: tuple[int, ...]
    group: str  # of the optimizer


class CheckpointRecord(CheckedRecord):
    FILE_NAME = STATE_NAME
    MEANING = "a checkpoint record"
    FORMAT_VERSION = 1

    recap_ds_version: str
    saved_at: str | None = None  # UTC, ISO 8601; None in those of before it was written down
    step: int
    adam_step: int  # applied optimizer steps, for Adam's bias correction
    world: int
    zero_stage: int
    precision: str  # of the forward copies; all that is stored is float32
    groups: tuple[GroupSettings, ...]
    parameters: dict[str, ParameterRecord]  # the trainable ones, by name in the model
    shadows: dict[str, tuple[str, ...]]  # kind -> names of online parameters
    files: dict[str, FileRecord]
    state: dict[str, Any]  # the training loop's


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, in words; [] if it is whole. Reads every byte of it, needs no engine."""
    try:
        record = CheckpointRecord.load(path)
    except UsageError as error:
        return [str(error)]
    return name_problems(path, record) + file_problems(path, record.files)


def name_problems(path: Path, record: CheckpointRecord) -> list[str]:
    """A copy under another name would be taken for another step."""
    if parse_step(path.name) in (None, record.step):
        return []
    return [f"is named {path.name} and holds step {record.step}"]


def open_tiles(path: Path, record: CheckpointRecord) -> TileReader:
    return TileReader([path / rank_file_name(rank) for rank in range(record.world)])
