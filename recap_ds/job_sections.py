"""The sections of what comes beside and after training: evaluation, labels, environments, collection.

As those of ``sections.py``; rules between sections stand in ``config.py``.
"""

import re
from typing import Literal

from pydantic import Field, field_validator

from recap_ds.sections import Section


class EvaluationConfig(Section):
    # Held-out evaluation during training; the last step is always evaluated.
    every_steps: int = Field(1000, ge=1)
    max_samples: int = Field(512, ge=1)
    # Samples per batch, which has one row more: it lends its images to another (shuffled-image gap).
    batch_size: int = Field(32, ge=1)
    # Flow times of the seeded grid, evenly spaced in (0, 1).
    num_flow_times: int = Field(4, ge=1)
    # The held-out figure that decides which checkpoint is best: loss, nll and mae by being low, the others high.
    gate: Literal["loss", "nll", "mae", "rank_correlation", "separation", "shuffled_image_gap"] = "loss"

    # Rollouts (launch/evaluate.py --env). Episode n has the seed rollout_seed + n under every indicator, guidance and
    # checkpoint, so that they can be compared pair by pair.
    rollout_seed: int = Field(1000, ge=0, lt=2**31)
    indicators: tuple[Literal["positive", "negative", "none"], ...] = Field(("positive",), min_length=1)
    # Each is run with every indicator but none, which guidance cannot reach.
    guidance_betas: tuple[float, ...] = Field((1.0,), min_length=1)
    # Frames of a chunk that are executed before the policy looks again; None is all of them.
    executed_frames: int | None = Field(None, ge=1)
    # Observations per forward: results depend on it in their last bits, and on nothing else below.
    rollout_batch_size: int = Field(8, ge=1)
    # Environment processes per rank; None is one per core of the rank, at most rollout_batch_size.
    num_envs: int | None = Field(None, ge=1)
    # Episodes filmed per indicator and guidance, the first ones.
    num_videos: int = Field(2, ge=0)


class LabelConfig(Section):
    """Advantage labels of a whole shard folder, from a trained critic (``launch/label.py``)."""

    # How far an advantage looks ahead: native frames (50), seconds ("1.0s"), or "episode" for all of it.
    lookahead: int | str = 50
    # distributional: N-step advantage, from a distributional critic. iql: min Q - V. blend: both, from an IQL critic.
    source: Literal["distributional", "iql", "blend"] = "distributional"
    # Share of the N-step advantage in a blend; min Q - V has the rest.
    blend: float = Field(0.5, ge=0, le=1)
    # What RECAP does not do, for ablations. labelled: corrections are ranked like autonomous samples. shared: one
    # threshold for all tasks. shuffle: controls, dealt out anew at random within a task: the advantages of the samples
    # that are ranked, or the labels with their advantages, of all samples and so of people's frames too.
    corrections: Literal["positive", "labelled"] = "positive"
    thresholds: Literal["per_task", "shared"] = "per_task"
    shuffle: Literal["none", "advantages", "labels"] = "none"
    # Samples per forward; the last batch of a shard is padded to it.
    batch_size: int = Field(64, ge=1)

    @field_validator("lookahead")
    @classmethod
    def _is_a_length(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        seconds = re.fullmatch(r"(\d+(?:\.\d+)?)s", value) if isinstance(value, str) else None
        if value == "episode" or (seconds and float(seconds[1]) > 0) or (isinstance(value, int) and value >= 1):
            return value
        raise ValueError(f"label.lookahead: {value!r} is neither frames (50), seconds (1.0s) nor 'episode'")

    def lookahead_frames(self, fps: float) -> int | None:
        """None is to the end of the episode."""
        if self.lookahead == "episode":
            return None
        if isinstance(self.lookahead, int):
            return self.lookahead
        return max(1, round(float(self.lookahead.removesuffix("s")) * fps))


class EnvConfig(Section):
    """How the environment of ``--env`` is shown to the policy, and for how long."""

    # The policy's camera -> the environment's; None where both have the same names.
    cameras: dict[str, str] | None = None
    # Side of the pictures in pixels: that of the shards the policy learned from. None is model.image_size.
    image_size: int | None = Field(None, ge=16, le=2048)
    # Frames after which an episode is out of time (counted by value.timeout_is); None is the environment's own limit.
    max_steps: int | None = Field(None, ge=1)
    # Meta-World: meshes of more faces are not drawn (1500 leaves gripper and objects); much faster without a GPU.
    max_mesh_faces: int | None = Field(None, ge=1)
    # Task of the environment -> what the policy is told there, in place of the environment's own words.
    prompts: dict[str, str] = Field(default_factory=dict)
    # gymnasium alone. Control rate, where the environment does not say; where state and success are found (state_key
    # in the observation, None = it is the observation; success_key in info).
    fps: float | None = Field(None, gt=0)
    state_key: str | None = None
    success_key: str = "is_success"
    # Keyword arguments of the environment.
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class CollectConfig(Section):
    """Episodes for the next iteration (``recap-ds collect``). Lengths are native frames."""

    # A takeover: progress has not risen by more than stall_margin for stall_frames. It is the environment's own
    # measure, or a critic's value where the policy looks; the expert then acts for correction_frames.
    progress: Literal["environment", "value"] = "environment"
    stall_frames: int = Field(20, ge=1)
    stall_margin: float = Field(0.0, ge=0)
    correction_frames: int = Field(30, ge=1)
    # Spread of the noise in demonstrations, in units of half the range of each action dim.
    demo_noise: float = Field(0.0, ge=0)
    # Without --checkpoint a mediocre expert stands in for the policy: its speed, and in the same units the spread of a
    # bias that it keeps for an episode and of its noise in every frame.
    expert_speed: float = Field(0.6, gt=0, le=1)
    expert_bias: float = Field(0.1, ge=0)
    expert_noise: float = Field(0.5, ge=0)
