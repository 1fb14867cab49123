"""``run/base.json`` and what it leads to: the frozen weights, architecture and tokenizer that checkpoints leave out."""

import json
from pathlib import Path
from typing import Any, Literal

from recap_ds.checkpoint import layout
from recap_ds.config import VlmSource
from recap_ds.errors import UsageError
from recap_ds.files.records import CheckedRecord, FileRecord, file_problems
from recap_ds.models.export_format import VLM_CONFIG_NAME
from recap_ds.models.vlm_weights import locate_vlm


class BaseRecord(CheckedRecord):
    FILE_NAME = layout.BASE_RECORD_NAME
    MEANING = "a base record"
    FORMAT_VERSION = 1

    # run: in run/base/. files: in ``folder``. trained: in every checkpoint.
    weights: Literal["run", "files", "trained"]
    folder: str | None = None
    files: dict[str, FileRecord]  # the weight files, by name in their folder

    def check(self, folder: Path) -> None:
        """UsageError unless ``folder`` holds the very files the run was started with."""
        if problems := file_problems(folder, self.files):
            raise UsageError(f"{folder}: {problems[0]}; the run was started from other weights, put those back")


def frozen_weights(run: Path, source: VlmSource) -> Path | None:
    """Folder with the checked weights of the run's frozen VLM; None where the VLM is in the checkpoints."""
    record = BaseRecord.load(run)
    if record.weights == "trained":
        return None
    folder = run / layout.BASE_NAME
    if record.weights == "files":
        folder = Path(record.folder)
        if not folder.is_dir():  # moved, or the run was copied to another machine
            folder = locate_vlm(source)
    record.check(folder)
    return folder


def read_vlm_config(run: Path) -> dict[str, Any]:
    path = run / layout.BASE_NAME / VLM_CONFIG_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the run's VLM architecture cannot be read ({error})") from None
