"""What a trained policy and a robot must agree on; written into every run and every export.

The model itself works in padded, normalised units and knows no robot: this file is all that ties it to one.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

CONTRACT_NAME = "contract.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskContract(_Part):
    prompt: str
    max_length: int  # L_task in native frames: what values are measured in


class RobotContract(_Part):
    cameras: tuple[str, ...]  # in slot order
    camera_slots: dict[str, str | None] | None = None  # data.camera_slots; None = every camera is its own slot
    image_size: int  # pixels, square; other images are resized with padding
    state_dim: int
    action_dim: int
    fps: float  # native control rate of the actions
    tasks: dict[str, TaskContract]
    normalizer: dict  # Normalizer.to_dict()
    manifest_hash: str  # of the shards it was trained on

    @property
    def slots(self) -> tuple[str | None, ...]:
        """Camera of each of the model's slots; None = the slot is empty."""
        return self.cameras if self.camera_slots is None else tuple(self.camera_slots.values())

    def save(self, folder: Path) -> None:
        write_file(folder / CONTRACT_NAME, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "RobotContract":
        path = folder / CONTRACT_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise UsageError(f"{path}: not a readable contract ({reason})") from None
