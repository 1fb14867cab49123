"""What every producer of data hands to the shard writer: whole episodes, one at a time.

The LeRobot importer, the synthetic maker and, later, collection in a simulator all end here, so that the rules of the
shard format (windows, control changes, outcomes) stand in one place: ``writer.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recap_ds.config import SourceName

# uint8 images of some frames of one episode: camera name -> [len(frames), height, width, 3], RGB.
FrameReader = Callable[[list[int]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Episode:
    """T frames o_0..o_{T-1} with the action taken at each; no observation after the last action is kept."""

    name: str  # "<data set>/<index>", the same in every shard the episode reaches
    task: str  # stable identifier of the task
    prompt: str  # what the policy is told
    source: SourceName  # of the data set; policy-controlled frames of an intervention episode become "auto"
    outcome: str  # success | failure | truncated | unknown, of the whole episode
    fps: float
    states: np.ndarray  # [T, S] float32
    actions: np.ndarray  # [T, A] float32
    read_frames: FrameReader  # called in the writer's worker processes: must be picklable
    human: np.ndarray | None = None  # [T] bool, True = a human acts; None = nobody took over
    rewards: np.ndarray | None = None  # [T] float32 environment rewards, where the data has them
    origin: str = ""  # where it came from, for people

    @property
    def num_frames(self) -> int:
        return len(self.states)
