"""collection.json: by whom and how the data sets of a folder were collected.

With other settings the missing episodes of a data set would be of another kind, so that is refused. What stands here
of a data set without any episode binds nobody.
"""

import json
from pathlib import Path
from typing import Any

from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

RECORD_NAME = "collection.json"
Settings = dict[str, Any]


class CollectionRecord:
    def __init__(self, out: Path) -> None:
        self._path = out / RECORD_NAME
        self._settings = _load(self._path)

    def of(self, dataset: str) -> Settings | None:
        return self._settings.get(dataset)

    def check(self, dataset: str, now: Settings) -> None:
        """UsageError unless ``dataset``, of which there are episodes, was collected as ``now``."""
        before = self.of(dataset)
        if before is None:
            raise UsageError(
                f"{self._path}: does not say how data set '{dataset}', which is there, was collected; "
                "give a new one a --name"
            )
        if differing := describe_difference(before, now):
            raise UsageError(
                f"{self._path}: data set '{dataset}' was collected with another {differing}; give a new one a --name"
            )

    def set(self, dataset: str, settings: Settings) -> None:
        """Durable when it returns."""
        if self._settings.get(dataset) != settings:
            self._settings[dataset] = settings
            write_file(self._path, (json.dumps(self._settings, indent=1) + "\n").encode())


def describe_difference(before: Settings, now: Settings) -> str:
    """The keys of ``now`` that differ and their values; '' where none does."""
    then, here = _flat(before), _flat(now)
    return ", ".join(
        f"{key} ({then.get(key)!r}, now {here[key]!r})" for key in sorted(here) if then.get(key) != here[key]
    )


def _flat(settings: Settings) -> Settings:
    """env_settings under the names that the command line has for them."""
    plain = {key: value for key, value in settings.items() if key != "env_settings"}
    return plain | {f"env.{key}": value for key, value in settings.get("env_settings", {}).items()}


def _load(path: Path) -> dict[str, Settings]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(record, dict):
        raise _damaged(path, "it holds no data sets")
    for dataset, settings in record.items():
        if not isinstance(settings, dict) or not isinstance(settings.get("env_settings"), dict):
            raise _damaged(path, f"it holds no settings of '{dataset}'")
    return record


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path}: is damaged ({why}); put a copy back, or move it away and collect under a --name that is not there yet"
    )
