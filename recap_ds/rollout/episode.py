"""What is to be played and what came of it: plain values that travel between processes.

T frames   K executed actions   S, A state and action dims   P picture side
"""

from typing import Literal, NamedTuple

import numpy as np

from recap_ds.config import CollectConfig

# Who corrects a policy: the environment's expert, or a person in a window.
CorrectorName = Literal["script", "keyboard"]


class EpisodePlan(NamedTuple):
    """One episode to play. ``number`` keys everything random about it, whoever plays it and wherever."""

    number: int
    seed: int  # of the environment
    task: str  # by the environment's name
    prompt: str
    arm: int = 0  # which of the compared ways to act; the caller's own numbering
    # Pictures of every frame are kept: for films and for shards. Else only what the policy reads is rendered.
    keeps_pictures: bool = False
    # The policy acts, the policy acts and the corrector corrects it, or the expert acts alone.
    mode: Literal["policy", "corrected", "expert"] = "policy"
    # True = there is no policy: the expert, made mediocre by collect.expert_*, acts in its place.
    stands_in: bool = False


class Look(NamedTuple):
    """What a policy reads when it is to act again."""

    frame: int
    observation: dict[str, np.ndarray | str]


class PlayedEpisode(NamedTuple):
    """One finished episode: o_0..o_{T-1}, each with the action taken there."""

    plan: EpisodePlan
    success: bool
    terminated: bool  # True = the task ended, in success or failure; False = time ran out
    states: np.ndarray  # [T, S] float32
    actions: np.ndarray  # [T, A] float32, as executed: within the bounds
    rewards: np.ndarray  # [T] float32, the environment's
    expert: np.ndarray  # [T] bool, True = not the policy acted: a demonstration or a correction
    pictures: dict[str, np.ndarray] | None  # camera -> [T, P, P, 3] uint8
    num_rendered: int  # times a picture was made of the world

    @property
    def num_frames(self) -> int:
        return len(self.states)

    @property
    def outcome(self) -> Literal["success", "failure", "truncated"]:
        """As shards call it. What running out of time counts as is the trainer's business (``value.timeout_is``)."""
        if self.success:
            return "success"
        return "failure" if self.terminated else "truncated"


class PlayRules(NamedTuple):
    """How an environment process plays; the same for all its episodes."""

    collect: CollectConfig
    seed: int  # of the expert's noise
    corrector: CorrectorName = "script"
