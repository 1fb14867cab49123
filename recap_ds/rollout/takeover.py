"""When an expert takes over: the best progress of the episode has not risen for a while.

Progress is the environment's own measure (a distance, a shaped reward) or a critic's value; either rises as the task
gets done.
"""

from recap_ds.config import CollectConfig


class Takeover:
    """Of one episode."""

    def __init__(self, settings: CollectConfig) -> None:
        self._settings = settings
        self.hand_back()

    def hand_back(self) -> None:
        """The policy acts again: what it is measured by starts anew."""
        self._best: float | None = None
        self._frames_without_progress = 0

    def stalls(self, progress: float, num_frames: int) -> bool:
        """``num_frames`` after the last call ``progress`` was measured. True = time to take over."""
        if self._best is None or progress > self._best + self._settings.stall_margin:
            self._best, self._frames_without_progress = progress, 0
            return False
        self._frames_without_progress += num_frames
        return self._frames_without_progress >= self._settings.stall_frames
