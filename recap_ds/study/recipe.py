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
arms stand here, an arm's seeds together; paths are as seen from where the command runs.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LabelSettings
from recap_ds.errors import UsageError
from recap_ds.recipe import DRIVEN_KEYS, first_fault, load_config, read_recipe

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
    guidance_beta: float = Field(1.0, ge=0)
    collect: Collection


class Arm(_Part):
    # imitation: stage policy, every sample positive. joint: stage joint. recap: critic, labels, policy.
    method: Literal["imitation", "joint", "recap"]
    settings: tuple[str, ...] = ()  # of the policy's training
    labels: tuple[str, ...] = ()  # of recap: over those of all labels, from the same critic
    guidance_betas: tuple[float, ...] = Field((1.0,), min_length=1)
    seeds: tuple[int, ...] | None = None  # None: the study's
    after: Round | None = None
    policy_of: str | None = None  # an arm whose policy this one judges, under other guidances: nothing is trained


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
    seeds: tuple[int, ...] = Field(min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_hold_together(self) -> "StudyRecipe":
        for name, arm in self.arms.items():
            if arm.method == "joint" and self.joint is None:
                raise ValueError(f"arms.{name}: method joint needs 'joint', the recipe of its training")
            if arm.labels and arm.method != "recap":
                raise ValueError(f"arms.{name}.labels: only method recap reads labels")
            if arm.after is not None and arm.after.by not in self.arms:
                raise ValueError(f"arms.{name}.after.by: there is no arm '{arm.after.by}'")
            if arm.after is not None and not set(self.seeds_of(name)) <= set(self.seeds_of(arm.after.by)):
                raise ValueError(f"arms.{name}.seeds: '{arm.after.by}', which collects for it, has not all of them")
            if arm.policy_of is not None and arm.policy_of not in self.arms:
                raise ValueError(f"arms.{name}.policy_of: there is no arm '{arm.policy_of}'")
            if arm.after is not None and self.arms[arm.after.by].after is not None:
                raise ValueError(f"arms.{name}.after.by: '{arm.after.by}' comes after another arm itself")
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        seeds = self.arms[arm].seeds
        return self.seeds if seeds is None else seeds

    def units(self) -> list[Unit]:
        """In the order in which they run."""
        return [Unit(arm, seed) for arm in self.arms for seed in self.seeds_of(arm)]

    def pretrain_config(self) -> PiStarRECAPConfig:
        return load_config(self.pretrain.recipe, [*self.pretrain.settings, "training.stage=policy", "recap.sft=true"])

    def critic_config(self) -> PiStarRECAPConfig:
        return load_config(self.critic.recipe, [*self.critic.settings, "training.stage=critic", *self.label_settings])

    def labels_wanted(self, arm: Arm) -> LabelSettings:
        """What the labels of an arm must have been made with."""
        config = load_config(self.critic.recipe, [*self.critic.settings, *self.label_settings, *arm.labels])
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

    def shared_facts(self) -> dict[str, Any]:
        """All that every unit follows from, as it is and not as it is called."""
        return {
            "env": self.env,
            "env_settings": sorted(self.env_settings),
            "data": self.data.model_dump(mode="json"),
            "critic_seed": self.critic_seed,
            "label_settings": sorted(self.label_settings),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "pretrain": training_facts(self.pretrain_config()),
            "critic": training_facts(self.critic_config()),
        }

    def arm_facts(self, name: str) -> dict[str, Any]:
        """What is an arm's own."""
        arm = self.arms[name]
        return {
            **arm.model_dump(mode="json", exclude={"settings", "seeds"}),
            "policy": training_facts(self.policy_config(arm)),
        }


def stage_settings(arm: Arm, labels: str) -> list[str]:
    """What an arm's method says of its policy's training."""
    if arm.method == "recap":
        return ["training.stage=policy", "recap.sft=false", f"data.labels={labels}"]
    if arm.method == "joint":
        return ["training.stage=joint"]
    return ["training.stage=policy", "recap.sft=true"]


def training_facts(config: PiStarRECAPConfig) -> dict[str, Any]:
    """Of a training: what decides what it learns."""
    sections = ("chunk_size", "model", "lora", "iql", "value", "recap", "training", "data", "label")
    return config.model_dump(mode="json", include=set(sections))


def load_study_recipe(path: str | Path) -> StudyRecipe:
    """UsageError, in one line, for everything in it that a later job would trip over."""
    try:
        recipe = StudyRecipe(**read_recipe(path))
    except ValidationError as error:
        fault = first_fault(error, (StudyRecipe, Arm, Job, Collection, Evaluation, Round), "recap_ds/study/recipe.py")
        raise UsageError(f"--config {path}: {fault}") from None
    if not Path(recipe.deepspeed).is_file():
        raise UsageError(f"--config {path}: deepspeed: there is no file {recipe.deepspeed}")
    _check_settings(path, recipe)
    return recipe


def _check_settings(path: str | Path, recipe: StudyRecipe) -> None:
    by_place: dict[str, Job | Collection | Evaluation | Arm] = {"pretrain": recipe.pretrain, "critic": recipe.critic}
    by_place |= {"policy": recipe.policy, "data": recipe.data, "evaluation": recipe.evaluation}
    by_place |= {f"arms.{name}": arm for name, arm in recipe.arms.items()}
    for place, part in by_place.items():
        for text in part.settings:
            if text.partition("=")[0] in OWN_KEYS:
                raise UsageError(f"--config {path}: {place}.settings: leave out '{text}', the study says that itself")
    checks = {
        "pretrain": recipe.pretrain_config,
        "critic": recipe.critic_config,
        "data": lambda: load_config(None, [*recipe.env_settings, *recipe.data.settings]),
        "evaluation": lambda: load_config(None, [*recipe.env_settings, *recipe.evaluation.settings]),
        **{f"arms.{name}": lambda name=name: _check_arm(recipe, name) for name in recipe.arms},
    }
    for place, check in checks.items():
        try:
            check()
        except UsageError as error:
            raise UsageError(f"--config {path}: {place}: {error}") from None


def _check_arm(recipe: StudyRecipe, name: str) -> None:
    arm = recipe.arms[name]
    config = recipe.policy_config(arm)
    if arm.method != "recap":
        return
    labels = recipe.labels_wanted(arm)
    if labels.demos != config.recap.demos:
        raise UsageError(f"recap.demos is {labels.demos} for the labels and {config.recap.demos} for the policy")
