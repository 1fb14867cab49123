"""``manifest.json`` of a shard folder: what is in it, its statistics, every shard's size and sha256.

It has a checksum of its own, and is written last and atomically, so a folder is what its manifest says: tars it does
not list are no part of the data.
Counts are derived from the shard indices alone; W = action_width, the stored width of an action chunk.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recap_ds.config import SourceName
from recap_ds.data.stats import FeatureStats
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
FeatureName = Literal["state", "actions"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskEntry(_Part):
    prompt: str
    longest: int = Field(ge=1)  # frames of the task's longest episode, over all sources
    episodes: int = Field(ge=1)


class SourceCounts(_Part):
    samples: int
    frames: int  # native frames, whatever the stride
    episodes: int  # an intervention episode counts here and under "auto" where it has frames of both
    human_frames: int
    outcomes: dict[str, int]  # episodes per outcome


class ShardEntry(_Part):
    name: str = Field(pattern=r"^(demo|auto|intervention)-\d{6,}\.tar$")
    source: SourceName
    num_samples: int
    bytes: int
    sha256: str


class Manifest(_Part):
    schema_version: Literal[1] = SCHEMA_VERSION
    cameras: tuple[str, ...]  # sorted
    state_dim: int
    action_dim: int
    action_width: int  # W: frames of action stored per sample
    fps: float
    td_horizon: int  # frames of the TD window at most
    image_size: int  # stored images are square, in pixels
    has_next: bool  # every sample that needs a next observation has one
    has_rewards: bool  # every sample has environment rewards
    # Task ids are positions here: new tasks are only ever appended.
    tasks: dict[str, TaskEntry]
    counts: dict[SourceName, SourceCounts]
    # Over the samples' own frames: their state and the first row of their chunk.
    statistics: dict[SourceName, dict[FeatureName, FeatureStats]]
    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def merged_statistics(self, feature: FeatureName) -> FeatureStats:
        """Over all sources."""
        return FeatureStats.merge([per_feature[feature] for per_feature in self.statistics.values()])

    def content_hash(self) -> str:
        """sha256 of the canonical JSON: what checkpoints and labels record."""
        return _checksum(self.model_dump(mode="json"))

    def to_json(self) -> str:
        values = self.model_dump(mode="json")
        return json.dumps({"sha256": _checksum(values), **values}, indent=1) + "\n"

    def save(self, folder: str | Path) -> None:
        write_file(Path(folder) / MANIFEST_NAME, self.to_json().encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        path = Path(folder) / MANIFEST_NAME
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"{path}: missing; make shards with 'recap-ds shards make' or 'import', or index existing tars with "
                f"'recap-ds shards index {folder}'"
            ) from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        return cls.parse(data, folder)

    @classmethod
    def parse(cls, data: bytes, folder: str | Path) -> "Manifest":
        """``folder``: where it came from, for messages; an address where that is remote."""
        path = f"{folder}/{MANIFEST_NAME}"
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({error}); rebuild it with 'recap-ds shards index {folder}'") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            mend = "update recap_ds" if newer else f"rebuild it with 'recap-ds shards index {folder}'"
            raise UsageError(f"{path}: schema_version is {version!r}, this program reads {SCHEMA_VERSION}; {mend}")
        written = values.pop("sha256", None)  # manifests of earlier versions have none
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UsageError(
                f"{path}: {place}: {first['msg']}; rebuild it with 'recap-ds shards index {folder}'"
            ) from None
        if written is not None and written != _checksum(values):
            raise UsageError(
                f"{path}: was changed or damaged (its checksum differs); copy it again, or rebuild it with "
                f"'recap-ds shards index {folder}'"
            )
        return manifest


def _checksum(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def check_agreement(
    folder: str | Path,
    old: Manifest,
    new: dict[str, object],
    where: str | Path = "here",
    mend: str = "import into another folder",
) -> None:
    """``new``: keys of the manifest -> values of what is to join ``old``. UsageError names the first that differs."""
    for key, now in new.items():
        before = getattr(old, key)
        if before != now:
            place = where if where == "here" else f"in {where}"
            raise UsageError(f"{folder}: {key} is {before!r} there but {now!r} {place}; {mend}")
