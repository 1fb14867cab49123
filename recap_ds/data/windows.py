"""Which frames of an episode become samples, and how far each one's actions and TD window reach.

T = frames of the episode, n = samples. A segment is a run of frames under one control; no window leaves its segment.
An episode stores o_0..o_{T-1} and no o_T, so a window that reaches T needs the task to have ended there.
"""

from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    frame: np.ndarray  # [n] int64, where the sample starts
    human: np.ndarray  # [n] bool, True = a human acts in this frame
    num_valid: np.ndarray  # [n] int64 >= 1, actions until the segment ends
    next_offset: np.ndarray  # [n] int64, k of the TD window; 0 = there is none
    needs_next: np.ndarray  # [n] bool, True = TD reads the observation at frame + next_offset


def sample_windows(human: np.ndarray, ends_task: bool, td_horizon: int, stride: int) -> Windows:
    """``human`` [T] bool; ``ends_task``: the last action ended the task, in success or failure.

    The stride counts from the start of each segment, so that a correction shorter than the stride still gives a sample.
    """
    num_frames = len(human)
    starts = np.concatenate([[0], np.flatnonzero(human[1:] != human[:-1]) + 1])
    ends = np.append(starts[1:], num_frames)
    segment = np.repeat(np.arange(len(starts)), ends - starts)
    frame = np.flatnonzero((np.arange(num_frames) - starts[segment]) % stride == 0)
    num_valid = ends[segment[frame]] - frame
    next_offset = np.minimum(num_valid, td_horizon)
    if not ends_task:
        next_offset = np.minimum(next_offset, num_frames - 1 - frame)
    # Only a window of an ended task can reach T: the others were just shortened to T - 1.
    needs_next = (next_offset > 0) & (frame + next_offset < num_frames)
    return Windows(frame, human[frame], num_valid, next_offset, needs_next)
