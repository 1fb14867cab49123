"""``state.json``: everything about a checkpoint that is not a tensor, and the check that its files are whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from recap_ds.checkpoint.layout import STATE_NAME
from recap_ds.errors import UsageError
from recap_ds.models.tensor_file import FileRecord, file_problems, write_text

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
        body = self.model_dump(mode="json")
        write_text(folder / STATE_NAME, json.dumps({"sha256": _checksum(body), **body}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "CheckpointRecord":
        path = folder / STATE_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["format_version"] != FORMAT_VERSION:
                raise UsageError(f"{path}: format {body['format_version']}, this version reads format {FORMAT_VERSION}")
            if body.pop("sha256") != _checksum(body):
                raise UsageError(f"{path}: was changed or damaged (its checksum differs)")
            return cls.model_validate(body)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValidationError):
            raise UsageError(f"{path}: is not a whole checkpoint record") from None


def _checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, in words; [] if it is whole. Reads every byte of it, needs no engine."""
    try:
        record = CheckpointRecord.load(path)
    except UsageError as error:
        return [str(error)]
    return file_problems(path, record.files)
