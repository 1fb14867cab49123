"""Exact frames of a video file by time, decoded in sequence and never more than one ahead.

LeRobot v3.0 lays many episodes end to end in one file, so a frame is asked for by its time in the file. Episodes are
read in chunks of consecutive frames: a file stays open between calls and decoding goes on where it stopped. A jump
back, or far ahead, seeks to the keyframe before the target. This file knows nothing of episodes or data sets.
"""

import functools
import os
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from recap_ds.errors import UsageError

# Up to about here decoding on is cheaper than a seek: LeRobot writes a keyframe every other frame, others one every few
# seconds.
SEEK_AHEAD_SECONDS = 1.0
# Containers index keyframes by decoding time, which with B-frames runs before the time shown: a seek may land past its
# target. Then it is tried again from further back, at last from the start.
SEEK_MARGINS_SECONDS = (0.0, 1.0, 10.0, float("inf"))
NUM_OPEN_VIDEOS = 16


def read_video_frames(path: str, seconds: list[float], tolerance_seconds: float, sides: tuple[int, int]) -> np.ndarray:
    """uint8 [N, height, width, 3] RGB: the frame shown at each of the N times, within the tolerance."""
    height, width = sides
    frames = np.empty((len(seconds), height, width, 3), np.uint8)
    try:
        # The process id keeps a forked worker off its parent's file position.
        video = _open_video(path, os.getpid())
        for row, moment in enumerate(seconds):
            frame = video.frame_at(moment, tolerance_seconds)
            if (frame.height, frame.width) != sides:
                raise UsageError(
                    f"{path}: frames are {frame.height}x{frame.width}, meta/info.json says {height}x{width}; "
                    f"correct its shape there"
                )
            frames[row] = video.as_rgb(frame)
    except av.FFmpegError as error:
        raise UsageError(f"{path}: not decodable ({error.strerror}); copy or re-encode the file") from error
    return frames


@functools.lru_cache(maxsize=NUM_OPEN_VIDEOS)
def _open_video(path: str, process_id: int) -> "_Video":
    return _Video(path)


class _Video:
    """An open file and the last frame decoded from it."""

    def __init__(self, path: str):
        self._path = path
        self._container = av.open(path)
        if not self._container.streams.video:
            raise UsageError(f"{path}: has no video stream; copy or re-encode the file")
        self._stream = self._container.streams.video[0]
        # Parallelism is over episodes (--jobs); decoder threads would only compete with it.
        self._stream.codec_context.thread_count = 1
        self._decoder: Iterator[av.VideoFrame] = iter(())
        self._held: av.VideoFrame | None = None
        # Kept from frame to frame: a frame's own conversion sets the scaler up anew, which costs more than converting.
        self._reformatter = VideoReformatter()

    def as_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [height, width, 3]."""
        return self._reformatter.reformat(frame, format="rgb24").to_ndarray()

    def frame_at(self, seconds: float, tolerance_seconds: float) -> av.VideoFrame:
        ahead_seconds = -1.0 if self._held is None else seconds + tolerance_seconds - self._held.time
        if not 0.0 <= ahead_seconds <= SEEK_AHEAD_SECONDS:
            self._seek(seconds, tolerance_seconds)
        while self._held is None or self._held.time < seconds - tolerance_seconds:
            if not self._decode_next():
                raise UsageError(f"{self._path}: ends before {seconds:.4f} s; copy or re-encode the file")
        if self._held.time > seconds + tolerance_seconds:
            raise UsageError(
                f"{self._path}: has no frame at {seconds:.4f} s, the next is at {self._held.time:.4f} s; "
                f"re-encode the file at a constant rate"
            )
        return self._held

    def _seek(self, seconds: float, tolerance_seconds: float) -> None:
        for margin_seconds in SEEK_MARGINS_SECONDS:
            start_seconds = max(seconds - margin_seconds, 0.0)
            self._container.seek(round(start_seconds / self._stream.time_base), stream=self._stream)
            self._decoder = self._container.decode(self._stream)
            if self._decode_next() and self._held.time <= seconds + tolerance_seconds:
                return

    def _decode_next(self) -> bool:
        """Hold the next frame; False at the end of the file."""
        self._held = next(self._decoder, None)
        if self._held is not None and (self._held.pts is None or self._held.is_corrupt):
            raise UsageError(f"{self._path}: a damaged frame; copy or re-encode the file")
        return self._held is not None
