"""What an iteration recipe says: which jobs, from which pre-trained checkpoints, over which shards.

    name: mw
    shards: [data/round_1, data/round_2]     # one folder per iteration, each with all data so far
    critic: {recipe: launch/recipes/metaworld_critic.yaml, start_from: runs/v_pre}
    label: {settings: [label.lookahead=50]}
    policy: {recipe: launch/recipes/metaworld_policy.yaml, start_from: runs/pi_pre}
    env: {name: "metaworld:reach-v3", settings: [env.image_size=64]}   # in a simulator, these three too:
    collect: {episodes: 60, corrections: 20}      # for iterations beyond the folders: by the policy of the one before
    evaluate: {episodes: 100}

Every iteration restarts from the same pre-trained checkpoints, never from the last iteration's (RECAP, arXiv
2511.14759, section V-D: what was learned stays in the data, and drift does not add up). Paths are as seen from where
the command runs.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recap_ds.checkpoint.layout import resolve_checkpoint
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.label.job import OPEN_KEYS, check_agree, check_keys
from recap_ds.models.export_format import EXPORT_NAME
from recap_ds.recipe import DRIVEN_KEYS, first_fault, load_config, read_recipe

# Stands for the tag of labels that do not exist yet, where a config is checked before its iteration.
LABELS_TO_COME = "to-come"
# Of the DeepSpeed JSON, what decides what is learned; the rest says where and how fast.
ARITHMETIC_KEYS = ("bf16", "data_types", "communication_data_type")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingJob(_Part):
    recipe: str
    # An export, a run or one of its checkpoints; None starts from the recipe's VLM alone.
    start_from: str | None = None
    # section.key=value, over the recipe's.
    settings: tuple[str, ...] = ()

    def config(self, *own: str) -> PiStarRECAPConfig:
        """As the job will read it; ``own`` are the iteration's overrides."""
        return load_config(self.recipe, [*self.settings, *own])

    def start(self) -> Path | None:
        """The export or step folder to start from, whatever ``latest`` becomes later."""
        if self.start_from is None:
            return None
        path = Path(self.start_from)
        return path.resolve() if (path / EXPORT_NAME).is_file() else resolve_checkpoint(path)


class LabelJob(_Part):
    settings: tuple[str, ...] = ()


class World(_Part):
    """The environment of collection and evaluation; ``settings`` are env.*."""

    name: str
    settings: tuple[str, ...] = ()


class CollectJob(_Part):
    episodes: int = Field(ge=1)
    corrections: int | None = Field(None, ge=1)
    settings: tuple[str, ...] = ()


class EvaluateJob(_Part):
    episodes: int = Field(ge=1)
    settings: tuple[str, ...] = ()


class IterationRecipe(_Part):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    shards: tuple[str, ...] = Field(min_length=1)
    deepspeed: str = "ds_configs/zero3.json"
    critic: TrainingJob
    label: LabelJob = LabelJob()
    policy: TrainingJob
    env: World | None = None
    collect: CollectJob | None = None
    evaluate: EvaluateJob | None = None

    def critic_config(self) -> PiStarRECAPConfig:
        return self.critic.config("training.stage=critic")

    def label_config(self) -> PiStarRECAPConfig:
        """The critic's, as the label job reads it: with the label job's own settings."""
        return self.critic.config("training.stage=critic", *self.label.settings)

    def policy_config(self) -> PiStarRECAPConfig:
        labels = f"data.labels={LABELS_TO_COME}"
        return self.policy.config("training.stage=policy", "recap.sft=false", labels)

    def arithmetic(self) -> dict[str, Any]:
        """What the DeepSpeed JSON says of it."""
        try:
            values = dict(json.loads(Path(self.deepspeed).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UsageError(f"there is no file {self.deepspeed}") from None
        except (OSError, ValueError, TypeError):
            raise UsageError(f"{self.deepspeed} cannot be read, or holds no JSON object") from None
        return {key: values[key] for key in ARITHMETIC_KEYS if key in values}

    def tag(self, number: int) -> str:
        """Of the labels of an iteration."""
        return f"{self.name}-{number:02d}"


def load_iteration_recipe(path: str | Path) -> IterationRecipe:
    """UsageError, in one line, for everything in it that a later job would trip over."""
    try:
        recipe = IterationRecipe(**read_recipe(path))
    except ValidationError as error:
        models = (IterationRecipe, TrainingJob, LabelJob, World, CollectJob, EvaluateJob)
        fault = first_fault(error, models, "recap_ds/iterate/recipe.py")
        raise UsageError(f"--config {path}: {fault}") from None
    for name, job in (("critic", recipe.critic), ("label", recipe.label), ("policy", recipe.policy)):
        for text in job.settings:
            if text.partition("=")[0] in DRIVEN_KEYS:
                raise UsageError(
                    f"--config {path}: {name}.settings: leave out '{text}', the iteration says that itself"
                )
    for shards in recipe.shards:
        if not (Path(shards) / "manifest.json").is_file():
            raise UsageError(f"--config {path}: shards: {shards} has no manifest.json; name folders of shards")
    places = [Path(shards).resolve() for shards in recipe.shards]
    for number, shards in enumerate(recipe.shards):
        if places[number] in places[:number]:
            raise UsageError(
                f"--config {path}: shards: {shards} is there twice; each iteration needs a folder of its own"
            )
    for job in ("collect", "evaluate"):
        if recipe.env is None and recipe.model_dump()[job] is not None:
            raise UsageError(f"--config {path}: {job}: needs an environment; add env: {{name: ...}}")
    _check_jobs(path, recipe)
    return recipe


def _check_jobs(path: str | Path, recipe: IterationRecipe) -> None:
    checks = {
        "critic": lambda: (recipe.critic_config(), recipe.critic.start()),
        "policy": lambda: (recipe.policy_config(), recipe.policy.start()),
        "label": lambda: _check_labels(recipe),
        "deepspeed": recipe.arithmetic,
    }
    if recipe.env is not None:
        for name, part in (("collect", recipe.collect), ("evaluate", recipe.evaluate)):
            settings = [*recipe.env.settings, *(part.settings if part is not None else ())]
            checks[name] = lambda settings=settings: load_config(None, settings)
    for name, check in checks.items():
        try:
            check()
        except UsageError as error:
            raise UsageError(f"--config {path}: {name}: {error}") from None


def _check_labels(recipe: IterationRecipe) -> None:
    """What the label and policy jobs would refuse, when the critic has been trained already."""
    check_keys(recipe.label.settings, OPEN_KEYS, "is settled by the critic")
    check_agree(recipe.label_config(), recipe.policy_config())
