"""What stands beside values and labels, as JSON: whose they are, how they were made, what they came to per task.

The files themselves are ``labels.py``'s.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from recap_ds.config import LabelConfig, ValueConfig
from recap_ds.errors import UsageError
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import FileRecord, read_checked_json, write_checked_json

FORMAT_VERSION = 1
VALUES_NAME, LABELS_NAME = "values.json", "labels.json"
PrecisionName = Literal["float32", "bfloat16"]
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValuesRecord(_Part):
    """``values.json``: whose values these are. A job goes on under a tag only where all of it agrees."""

    format_version: int = FORMAT_VERSION
    checkpoint_hash: str
    checkpoint_run: str | None
    checkpoint_step: int | None
    manifest_hash: str
    precision: PrecisionName
    batch_size: int
    # How the critic measures: rewards, and each task's longest episode L_task in frames.
    value: ValueConfig
    max_length: dict[str, int]

    def critic(self) -> str:
        """Whose they are, for people."""
        run = f"{self.checkpoint_run} at step {self.checkpoint_step}, " if self.checkpoint_run else ""
        return f"{run}checkpoint {self.checkpoint_hash[:12]}"

    def content_hash(self) -> str:
        """Names the job: every file of values carries it."""
        return _content_hash(self)


class ValuesFileRecord(_Part):
    """``values/<tag>/<shard>.json``: one shard is done."""

    format_version: int = FORMAT_VERSION
    job: str  # content_hash of the ValuesRecord
    num_unread: int  # samples without a value, because they could not be read
    file: FileRecord


class LabelSettings(_Part):
    """What makes labels of values, beside the values."""

    label: LabelConfig
    positive_fraction: float
    demos: Literal["positive", "labelled"]


class TaskLabels(_Part):
    """One task's counts. A sample is forced positive, or known, or neither: its advantage is not known.

    Of labels that were dealt out anew (``label.shuffle=labels``) none is forced, and known are those there are.
    """

    num_samples: int
    num_forced: int
    num_known: int  # not forced, with an advantage: those that were ranked
    num_positive: int  # of num_known
    forced_fraction: float
    positive_fraction: float | None  # realised, of num_known
    threshold: float | None  # the highest advantage that is not positive; of all tasks where they share it
    sigma: float | None  # standard deviation of the advantages that were ranked


class LabelRecord(_Part):
    """``labels.json``."""

    format_version: int = FORMAT_VERSION
    values_tag: str
    values: ValuesRecord
    settings: LabelSettings
    lookahead_frames: int | None  # None = to the end of the episode
    tasks: dict[str, TaskLabels]
    files: dict[str, FileRecord]

    def told(self) -> str:
        """What the labels are, for people."""
        label, demos, frames = self.settings.label, self.settings.demos, self.lookahead_frames
        blend = f" ({label.blend:g} of it N-step)" if label.source == "blend" else ""
        ahead = "to the end of the episode" if frames is None else f"{frames} frames"
        looks = "" if label.source == "iql" else f", looking ahead {ahead}"
        before = " before the shuffle" if label.shuffle == "labels" else ""
        usual = LabelConfig()
        others = [
            f"; label.{name}={getattr(label, name)}"
            for name in ("corrections", "thresholds", "shuffle")
            if getattr(label, name) != getattr(usual, name)
        ]
        return (
            f"advantage {label.source}{blend}{looks}; {self.settings.positive_fraction:g} of those not forced are "
            f"positive; demonstrations are {demos}{before}{''.join(others)}"
        )

    def content_hash(self) -> str:
        """sha256 of the canonical JSON, which holds every label file's checksum: what a run remembers of its labels."""
        return _content_hash(self)


def _content_hash(record: BaseModel) -> str:
    return hashlib.sha256(json.dumps(record.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


Record = TypeVar("Record", ValuesRecord, LabelRecord)


# How to get a record again that cannot be read.
MENDS = {
    ValuesRecord: "remove it and run launch/label.py again with this critic and tag: values that are sound stay",
    LabelRecord: "remove it and make the labels again, as they were made: by launch/label.py with this tag, or by "
    "'recap-ds labels rethreshold'",
}


def load_record(kind: type[Record], path: Path) -> Record:
    try:
        values: dict[str, Any] = read_checked_json(path, FORMAT_VERSION)
        return kind.model_validate(values)
    except UsageError as error:
        raise UsageError(f"{error}; {MENDS[kind]}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UsageError(f"{path}: '{place}' is not as this version writes it; {MENDS[kind]}") from None


def save_record(record: ValuesRecord | ValuesFileRecord | LabelRecord, path: Path) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        write_checked_json(unfinished, record.model_dump(mode="json"))
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def check_tag(tag: str, flag: str) -> str:
    if not TAG.fullmatch(tag):
        raise UsageError(f"{flag} {tag!r}: letters, digits, '.', '_' and '-' only, first a letter or digit")
    return tag
