"""What a study recipe says: one data set, one pre-training, and the arms that are compared on them.

    env: reach
    env_settings: [env.image_size=64]
    data: {episodes: 120, corrections: 40, demos: 30, settings: [collect.expert_speed=0.5]}
    pretrain: {recipe: policy.yaml, settings: [recap.sft=true]}
    critic: {recipe: critic.yaml}
    policy: {recipe: policy.yaml}
    evaluation: {episodes: 200, first_scene: 5000}
    seeds: [0, 1, 2]
    arms:
      imitation: {method: imitation}
      recap: {method: recap, guidance_betas: [1.0, 2.0]}

A unit is one arm under one seed. The first arm is what the others are held against. Units run in the order in which
arms stand here, an arm's seeds together, as far as what they need is done; paths are as seen from where the command
runs.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LabelSettings
from recap_ds.recipe import DRIVEN_KEYS, load_config

# What the study itself decides; a recipe's own values of these are replaced.
OWN_KEYS = (
    *DRIVEN_KEYS,
    "training.seed",
    "evaluation.indicators",
    "evaluation.guidance_betas",
    "evaluation.rollout_seed",
)
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
# Stands for the tag of labels that do not exist yet, where a config is checked before they do.
LABELS_TO_COME = "to-come"
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Part):
    """A training job: a recipe and what is set over it."""

    recipe: str
    settings: tuple[str, ...] = ()


class Collection(_Part):
    """Numbers of episodes over all tasks, as of ``recap-ds collect``."""

    episodes: int = Field(ge=1)
    corrections: int | None = Field(None, ge=1)
    demos: int | None = Field(None, ge=1)
    settings: tuple[str, ...] = ()


class Evaluation(_Part):
    """Every training seed is judged on scenes of its own, the same for all arms: so seeds add independent episodes."""

    episodes: int = Field(ge=1)  # over all tasks, which take turns
    first_scene: int = Field(1000, ge=0)  # evaluation.rollout_seed of training seed 0; the next begins where it ends
    settings: tuple[str, ...] = ()


class Round(_Part):
    """One more RECAP iteration: what ``by``, an arm of the same seed, collects joins the data, and all is trained anew
    from the pre-trained weights."""

    by: str
    guidance_beta: Guidance = 1.0
    collect: Collection


class Arm(_Part):
    # imitation: stage policy, every sample positive. joint: stage joint. recap: critic, labels, policy.
    method: Literal["imitation", "joint", "recap"]
    settings: tuple[str, ...] = ()  # of the policy's training
    labels: tuple[str, ...] = ()  # of recap: over those of all labels, from the same critic
    guidance_betas: tuple[Guidance, ...] = Field((1.0,), min_length=1)
    seeds: Seeds | None = None  # None: the study's
    after: Round | None = None
    policy_of: str | None = None  # an arm whose policy this one judges, under other guidances: nothing is trained

    @property
    def needs(self) -> str | None:
        """The arm whose policy of the same seed has to be there first."""
        return self.after.by if self.after is not None else self.policy_of

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> "Arm":
        _check_differ("guidance_betas", self.guidance_betas)
        if self.labels and self.method != "recap":
            raise ValueError("labels: only method recap reads labels")
        for key in ("settings", "labels", "after") if self.policy_of is not None else ():
            if self.model_dump()[key]:
                raise ValueError(f"policy_of: trains nothing, so there is no use for {key}; leave one of them out")
        return self


class Unit(NamedTuple):
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


class StudyRecipe(_Part):
    name: str = Field(pattern=NAME_PATTERN)
    env: str
    env_settings: tuple[str, ...] = ()  # env.*, of collection and evaluation
    deepspeed: str = "ds_configs/zero3.json"
    data: Collection
    pretrain: Job
    critic: Job
    critic_seed: int | None = Field(None, ge=0)  # of the one critic of all seeds; None: every seed trains its own
    label_settings: tuple[str, ...] = ()
    policy: Job
    joint: Job | None = None
    evaluation: Evaluation
    seeds: Seeds
    arms: dict[str, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_hold_together(self) -> "StudyRecipe":
        _check_differ("seeds", self.seeds)
        for name, arm in self.arms.items():
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"arms.{name}: name it with letters, digits, - and _, first a letter or digit")
            _check_differ(f"arms.{name}.seeds", self.seeds_of(name))
            if arm.method == "joint" and self.joint is None:
                raise ValueError(f"arms.{name}: method joint needs 'joint', the recipe of its training")
            if arm.needs is not None:
                self._check_needed(name, arm, f"arms.{name}.{'policy_of' if arm.after is None else 'after.by'}")
        return self

    def _check_needed(self, name: str, arm: Arm, key: str) -> None:
        """``key``: where ``arm`` names the one that it needs."""
        needed, names = str(arm.needs), list(self.arms)
        if needed not in self.arms:
            raise ValueError(f"{key}: there is no arm '{needed}'")
        if names.index(needed) >= names.index(name):
            raise ValueError(f"{key}: '{needed}' has to stand before it")
        if self.arms[needed].policy_of is not None:
            raise ValueError(f"{key}: '{needed}' trains no policy; name the arm whose policy it judges")
        if arm.after is not None and self.arms[needed].after is not None:
            raise ValueError(f"{key}: '{needed}' comes after another arm itself")
        if arm.policy_of is not None and arm.method != self.arms[needed].method:
            raise ValueError(f"{key}: '{needed}' is of method {self.arms[needed].method}; write that here too")
        if not set(self.seeds_of(name)) <= set(self.seeds_of(needed)):
            raise ValueError(f"arms.{name}.seeds: '{needed}', whose policy it needs, has not all of them")

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        seeds = self.arms[arm].seeds
        return self.seeds if seeds is None else seeds

    def units(self) -> list[Unit]:
        """In the order in which they run."""
        return [Unit(arm, seed) for arm in self.arms for seed in self.seeds_of(arm)]

    def pretrain_config(self) -> PiStarRECAPConfig:
        return load_config(self.pretrain.recipe, [*self.pretrain.settings, "training.stage=policy", "recap.sft=true"])

    def first_scene(self, seed: int) -> int:
        """Of the scenes on which a seed is judged."""
        return self.evaluation.first_scene + seed * self.evaluation.episodes

    def needed(self, unit: Unit) -> Unit | None:
        """The unit whose policy this one needs."""
        arm = self.arms[unit.arm].needs
        return None if arm is None else Unit(arm, unit.seed)

    def critic_of(self, unit: Unit) -> str | None:
        """The home of the critic that a unit's labels come from; None where it reads none."""
        arm = self.arms[unit.arm]
        if arm.method != "recap" or arm.policy_of is not None:
            return None
        return unit.name if arm.after is not None else f"critic{self.seed_of_critic(unit)}"

    def seed_of_critic(self, unit: Unit) -> int:
        return unit.seed if self.critic_seed is None else self.critic_seed

    def critic_config(self, *labels: str) -> PiStarRECAPConfig:
        """``labels``: an arm's own settings of them."""
        settings = [*self.critic.settings, "training.stage=critic", *self.label_settings, *labels]
        return load_config(self.critic.recipe, settings)

    def labels_wanted(self, arm: Arm) -> LabelSettings:
        """What the labels of an arm must have been made with."""
        config = self.critic_config(*arm.labels)
        fraction, demos = config.recap.positive_fraction, config.recap.demos
        return LabelSettings(label=config.label, positive_fraction=fraction, demos=demos)

    def policy_config(self, arm: Arm) -> PiStarRECAPConfig:
        """Of the training whose policy is judged."""
        job = self.policy_job(arm)
        return load_config(job.recipe, [*job.settings, *arm.settings, *stage_settings(arm, LABELS_TO_COME)])

    def policy_job(self, arm: Arm) -> Job:
        if arm.method == "joint":
            assert self.joint is not None, "checked when the recipe was read"
            return self.joint
        return self.policy


def stage_settings(arm: Arm, labels: str) -> list[str]:
    """What an arm's method says of its policy's training."""
    if arm.method == "recap":
        return ["training.stage=policy", "recap.sft=false", f"data.labels={labels}"]
    if arm.method == "joint":
        return ["training.stage=joint"]
    return ["training.stage=policy", "recap.sft=true"]


def _check_differ(key: str, values: Sequence[float]) -> None:
    """What is said twice would be counted twice."""
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{key}: says {twice[0]:g} twice")
