"""``state.json``: everything about a checkpoint that is not a tensor, and the check that its files are whole."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from recap_ds.checkpoint.layout import STATE_NAME, rank_file_name
from recap_ds.checkpoint.tile_file import TileReader
from recap_ds.errors import UsageError
from recap_ds.files.records import FileRecord, file_problems, read_checked_json, write_checked_json

FORMAT_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupSettings(_Part):
    name: str
    lr: float
    weight_decay: float


class ParameterRecord(_Part):
    shape: tuple[int, ...]
    group: str  # of the optimizer


class CheckpointRecord(_Part):
    format_version: int = FORMAT_VERSION
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

    def save(self, folder: Path) -> None:
        write_checked_json(folder / STATE_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "CheckpointRecord":
        path = folder / STATE_NAME
        try:
            return cls.model_validate(read_checked_json(path, FORMAT_VERSION))
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise UsageError(f"{path}: is not a checkpoint record ('{place}')") from None


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, in words; [] if it is whole. Reads every byte of it, needs no engine."""
    try:
        record = CheckpointRecord.load(path)
    except UsageError as error:
        return [str(error)]
    return file_problems(path, record.files)


def open_tiles(path: Path, record: CheckpointRecord) -> TileReader:
    return TileReader([path / rank_file_name(rank) for rank in range(record.world)])
