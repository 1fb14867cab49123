"""SRC of an import: a folder, or ``owner/name[@revision]`` of a data set on the Hugging Face hub.

Where the network is down, or HF_HUB_OFFLINE is set, what the cache holds is used: LeRobot's own (HF_LEROBOT_HOME) or
the hub's (HF_HOME). Nothing of the data set is executed; only its tables, videos and images are fetched.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

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
    def fetch(local_files_only: bool) -> Path:
        path = huggingface_hub.snapshot_download(
            hub_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=FETCHED,
            local_files_only=local_files_only,
        )
        return Path(path)

    # Exception, because errors below the hub's own come from a transport library that differs between its releases.
    try:
        return fetch(local_files_only=False)
    except Exception as error:
        try:
            # The hub's client does so itself, but not behind a broken proxy or where a connection ends half-way.
            return fetch(local_files_only=True)
        except Exception:
            at = f"@{revision}" if revision else ""
            raise UsageError(
                f"{hub_id}{at}: no such folder, not whole in the cache, and the hub does not give it "
                f"({one_line(error)}); fetch it with 'hf download --repo-type dataset {hub_id}' where there is a "
                f"network, or give a folder"
            ) from error
