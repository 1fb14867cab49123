"""SRC of an import: a folder, or ``owner/name[@revision]`` of a data set on the Hugging Face hub.

Where the network is down, or HF_HUB_OFFLINE is set, what the cache holds is used: LeRobot's own (HF_LEROBOT_HOME) or
the hub's (HF_HOME). Nothing of the data set is executed; only its tables, videos and images are fetched.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from recap_ds.data.lerobot.tables import one_line
from recap_ds.errors import UsageError

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
FETCHED = ["meta/*", "data/*", "videos/*", "images/*", "sarm_progress.parquet"]


class FoundDataset(NamedTuple):
    root: Path
    name: str  # for episode names, where the user gives none


def find_dataset(source: str) -> FoundDataset:
    folder = Path(source)
    match = HUB_ID.fullmatch(source)
    if folder.exists() or match is None:
        return FoundDataset(folder, folder.resolve().name)
    name = match["id"].partition("/")[2]
    recorded = _lerobot_home() / match["id"]
    if match["revision"] is None and (recorded / "meta" / "info.json").is_file():
        return FoundDataset(recorded, name)
    return FoundDataset(_snapshot(match["id"], match["revision"]), name)


def _lerobot_home() -> Path:
    """Where LeRobot keeps what it recorded or fetched itself."""
    hub_home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return Path(os.environ.get("HF_LEROBOT_HOME", hub_home / "lerobot")).expanduser()


def _snapshot(hub_id: str, revision: str | None) -> Path:
    try:
        # Goes on with what is cached where the hub cannot be reached.
        path = huggingface_hub.snapshot_download(
            hub_id, repo_type="dataset", revision=revision, allow_patterns=FETCHED, max_workers=4
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f"@{revision}" if revision else ""
        raise UsageError(
            f"{hub_id}{at}: no such folder, not in the cache, and the hub does not give it ({one_line(error)}); "
            f"fetch it with 'hf download --repo-type dataset {hub_id}' where there is a network, or give a folder"
        ) from error
    return Path(path)
