"""Episodes with numbers one can read back: state and action of frame t say t, and so does the picture's brightness."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.data.episodes import Episode
from recap_ds.data.index import SampleRecord, read_samples
from recap_ds.data.npy import npy_array
from recap_ds.data.writer import WriteReport, write_shards


@dataclass(frozen=True)
class FlatFrames:
    """Frame t of every camera is one grey level."""

    cameras: tuple[str, ...] = ("top",)
    shape: tuple[int, int] = (16, 16)

    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        pictures = np.stack([np.full((*self.shape, 3), grey_of(frame), dtype=np.uint8) for frame in frames])
        return dict.fromkeys(self.cameras, pictures)


@dataclass(frozen=True)
class BrokenFrames:
    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        raise RuntimeError("the camera file is gone")


def grey_of(frame: int) -> int:
    return frame * 7 % 256


def made_episode(number: int = 0, num_frames: int = 7, **changes) -> Episode:
    """A successful demo ``set/<number>``: state [t, number], action [t + 1, number + 1, -1]."""
    frames = np.arange(num_frames, dtype=np.float32)
    values = {
        "name": f"set/{number}",
        "task": "sort",
        "prompt": "sort the blocks",
        "source": "demo",
        "outcome": "success",
        "fps": 10.0,
        "states": np.stack([frames, np.full_like(frames, number)], axis=1),
        "actions": np.stack([frames + 1, np.full_like(frames, number + 1), np.full_like(frames, -1)], axis=1),
        "read_frames": FlatFrames(),
    }
    return Episode(**{**values, **changes})


def write(out: Path, episodes: Iterable[Episode], **changes) -> WriteReport:
    values = {"dataset": "set", "action_width": 4, "td_horizon": 3, "image_size": 16}
    return write_shards(out, episodes, **{**values, **changes})


@dataclass(frozen=True)
class StoredSample:
    shard: str
    key: str
    record: SampleRecord
    members: dict[str, bytes]

    def array(self, name: str) -> np.ndarray:
        return npy_array(self.members[f"{name}.npy"])


def read_back(folder: Path) -> list[StoredSample]:
    """Every sample of every tar, in order of episode and frame."""
    samples = [
        StoredSample(path.name, key, record, members)
        for path in sorted(folder.glob("*.tar"))
        for key, record, members, _ in read_samples(path)
    ]
    return sorted(samples, key=lambda sample: (sample.record.episode, sample.record.frame))
