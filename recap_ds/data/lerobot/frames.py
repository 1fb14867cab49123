"""The images of one episode, read when the shard writer asks: ``EpisodeFrames`` is the writer's ``FrameReader``.

A camera is either a span of a video file or a column of encoded images in the data file. Readers are plain values that
travel to the writer's worker processes, which open the files there and keep them open from one chunk of frames to the
next.
"""

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from PIL import Image

from recap_ds.data.lerobot.metadata import Camera
from recap_ds.data.lerobot.tables import one_line, open_parquet, read_table
from recap_ds.data.lerobot.video import read_video_frames
from recap_ds.errors import UsageError


@dataclass(frozen=True)
class VideoFrames:
    """A camera whose episode starts at ``from_seconds`` of a video file."""

    camera: Camera
    path: str
    from_seconds: float
    fps: float

    def read(self, frames: list[int]) -> np.ndarray:
        seconds = [self.from_seconds + frame / self.fps for frame in frames]
        return read_video_frames(self.path, seconds, 0.5 / self.fps, (self.camera.height, self.camera.width))


@dataclass(frozen=True)
class ParquetFrames:
    """A camera whose episode starts at ``first_row`` of a data file, as a column of structs {bytes, path}."""

    camera: Camera
    path: str
    first_row: int
    root: str  # image paths in the column are relative to the data set

    def read(self, frames: list[int]) -> np.ndarray:
        sides = (self.camera.height, self.camera.width)
        images = np.empty((len(frames), *sides, 3), np.uint8)
        starts = _row_group_starts(self.path)
        for position, frame in enumerate(frames):
            row = self.first_row + frame
            group = int(np.searchsorted(starts, row, side="right")) - 1
            cell = _image_column(self.path, self.camera.key, group, os.getpid())[row - int(starts[group])].as_py()
            image = self._decode(self._encoded(cell, frame), frame)
            if image.shape[:2] != sides:
                raise UsageError(f"frame {frame} is {image.shape[:2]}, meta/info.json says {sides}; correct its shape")
            images[position] = image
        return images

    def _encoded(self, cell: dict[str, bytes | str | None] | None, frame: int) -> bytes:
        if cell is not None and cell["bytes"] is not None:
            return cell["bytes"]
        relative = PurePosixPath(cell["path"] or "") if cell is not None else PurePosixPath()
        # Only files inside the data set: the column is data, not a licence to read the disk.
        if not relative.name or relative.is_absolute() or ".." in relative.parts:
            raise UsageError(f"frame {frame} has neither image bytes nor a path inside the data set; export it again")
        try:
            return (Path(self.root) / relative).read_bytes()
        except OSError as error:
            raise UsageError(f"frame {frame}: {one_line(error)}; copy the data set again") from error

    def _decode(self, encoded: bytes, frame: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return np.asarray(image.convert("RGB"))
        # PIL tells damage in all of these ways.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError(f"frame {frame} is not an image ({one_line(error)}); copy the data set again") from error


@functools.lru_cache(maxsize=32)
def _row_group_starts(path: str) -> np.ndarray:
    """First row of every row group."""
    metadata = open_parquet(Path(path)).metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum([0, *sizes[:-1]])


@functools.lru_cache(maxsize=8)
def _image_column(path: str, column: str, group: int, process_id: int) -> pa.ChunkedArray:
    """Encoded images of one row group: LeRobot writes small ones, so one per camera is kept."""
    cells = read_table(Path(path), [column], row_group=group).column(column)
    if not pa.types.is_struct(cells.type) or {"bytes", "path"} - {field.name for field in cells.type}:
        raise UsageError(f"{path}: column {column} is {cells.type}, not image structs {{bytes, path}}; export it again")
    return cells


@dataclass(frozen=True)
class EpisodeFrames:
    """Images of some frames of one episode, by camera name. Picklable; cheap to call with consecutive chunks."""

    episode: str
    cameras: tuple[VideoFrames | ParquetFrames, ...]
    # Native frames per frame of the episode: above 1 where the import resamples to a lower rate.
    native_frames_per_frame: float = 1.0

    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        native = nearest_native_frames(np.asarray(frames), self.native_frames_per_frame).tolist()
        images = {}
        for reader in self.cameras:
            try:
                images[reader.camera.name] = reader.read(native)
            except UsageError as error:
                raise UsageError(f"episode {self.episode}, camera {reader.camera.name}: {error}") from error
        return images


def nearest_native_frames(frames: np.ndarray, native_frames_per_frame: float) -> np.ndarray:
    """Native frame nearest to each frame. Halves go up, so that it increases at any rate up to the native one."""
    return np.floor(frames * native_frames_per_frame + 0.5).astype(np.int64)
