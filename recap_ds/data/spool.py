"""Every needed frame of an episode, resized and compressed once, in one temporary file.

A frame is wanted twice, as an observation and as the next observation of an earlier one, in shuffled order: it is
decoded and encoded here, in sequence and a few frames at a time, and the writer then copies bytes. Runs in worker
processes, so it imports nothing heavy. m = needed frames, C = cameras.

    00000007.spool       the JPEGs of episode 7 of this import
    00000007.spool.npz   where each lies, and a checksum; written once all are there, where the import can be resumed
"""

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.data.episodes import FrameReader
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file
from recap_ds.files.pool import process_pool
from recap_ds.processing.images import encode_jpeg, resize_with_padding

# Frames decoded at a time: bounds memory at about 30 MB per camera of 480 x 640.
FRAMES_PER_CHUNK = 32
CAMERA_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class SpoolJob:
    episode: str  # name, for messages
    number: int  # of the episode in this import
    read_frames: FrameReader
    frames: np.ndarray  # [m] int64, increasing
    image_size: int
    path: Path
    resumable: bool  # an earlier attempt may have made the same spool; this one leaves it to the next


@dataclass(frozen=True)
class Spool:
    """Where each JPEG of one episode lies."""

    number: int
    path: Path
    made_before: bool  # by an earlier attempt of this import
    frames: np.ndarray  # [m]
    cameras: tuple[str, ...]  # sorted
    places: np.ndarray  # [m, C, 2] int64: offset, size

    def read(self, frame: int) -> dict[str, bytes]:
        """camera -> JPEG."""
        row = self.places[np.searchsorted(self.frames, frame)]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return {
                camera: os.pread(descriptor, int(size), int(offset))
                for camera, (offset, size) in zip(self.cameras, row, strict=True)
            }
        finally:
            os.close(descriptor)


def spool_episodes(jobs: Iterable[SpoolJob], num_processes: int) -> Iterator[Spool]:
    """Work through ``jobs`` in any order, drawing from the iterable only a little ahead of the work."""
    if num_processes == 1:
        yield from map(spool_episode, jobs)
        return
    with process_pool(num_processes) as pool:
        try:
            running: set[Future[Spool]] = set()
            for job in jobs:
                running.add(pool.submit(spool_episode, job))
                if len(running) >= 2 * num_processes:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in wait(running).done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def spool_episode(job: SpoolJob) -> Spool:
    if job.resumable and (made := _made_before(job)):
        return made
    cameras: tuple[str, ...] | None = None
    places = []
    position, checksum = 0, 0
    # Under a name of its own until it is whole: a worker of a killed import may be at the same episode still.
    partial = job.path.with_name(f"{job.number}-{os.getpid()}.partial")
    with open(partial, "wb") as file:
        for first in range(0, len(job.frames), FRAMES_PER_CHUNK):
            chunk = job.frames[first : first + FRAMES_PER_CHUNK].tolist()
            pictures = job.read_frames(chunk)
            cameras = cameras or tuple(sorted(pictures))
            _check_pictures(job.episode, chunk, pictures, cameras)
            for i in range(len(chunk)):
                row = []
                for camera in cameras:
                    data = encode_jpeg(resize_with_padding(pictures[camera][i], job.image_size))
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)
                    row.append((position, len(data)))
                    position += len(data)
                places.append(row)
        if job.resumable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, job.path)
    assert cameras is not None, "an episode has at least one frame"
    spool = Spool(job.number, job.path, False, job.frames, cameras, np.array(places, dtype=np.int64))
    if job.resumable:
        buffer = io.BytesIO()
        np.savez(
            buffer, episode=job.episode, checksum=checksum, cameras=cameras, places=spool.places, frames=job.frames
        )
        write_file(_record_path(job.path), buffer.getvalue())
    return spool


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.npz")


def _made_before(job: SpoolJob) -> Spool | None:
    """The spool an earlier attempt left, if it is whole."""
    try:
        with np.load(_record_path(job.path), allow_pickle=False) as record:
            same = str(record["episode"]) == job.episode and np.array_equal(record["frames"], job.frames)
            if not same or zlib.crc32(job.path.read_bytes()) != int(record["checksum"]):
                return None
            cameras = tuple(record["cameras"].tolist())
            return Spool(job.number, job.path, True, job.frames, cameras, record["places"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # none was left, or it is damaged: it is made again


def _check_pictures(episode: str, chunk: list[int], pictures: dict[str, np.ndarray], cameras: tuple[str, ...]) -> None:
    where = f"episode {episode}, frames {chunk[0]}..{chunk[-1]}"
    if not pictures:
        raise UsageError(f"{where}: no camera; a sample needs at least one image")
    if tuple(sorted(pictures)) != cameras:
        raise UsageError(f"{where}: cameras are {sorted(pictures)}, earlier frames have {list(cameras)}")
    for camera, images in pictures.items():
        if not CAMERA_NAME.fullmatch(camera):
            raise UsageError(f"{where}: camera '{camera}': a name has letters, digits, '_' and '-' only")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != len(chunk) or images.shape[-1] != 3:
            raise UsageError(
                f"{where}: camera '{camera}' gave {images.dtype} {list(images.shape)}, "
                f"expected uint8 [{len(chunk)}, height, width, 3]"
            )
