"""A study's recipe, read: everything in it that a later job would trip over is said at once."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.label.job import ASSIGN_KEYS, OPEN_KEYS, check_agree, check_keys
from recap_ds.recipe import first_fault, load_config, read_recipe
from recap_ds.study.facts import read_deepspeed
from recap_ds.study.recipe import OWN_KEYS, Arm, Collection, Evaluation, Job, Round, StudyRecipe


def load_study_recipe(path: str | Path) -> StudyRecipe:
    """UsageError, in one line, where it cannot be run."""
    try:
        recipe = StudyRecipe(**read_recipe(path))
    except ValidationError as error:
        fault = first_fault(error, (StudyRecipe, Arm, Job, Collection, Evaluation, Round), "recap_ds/study/recipe.py")
        place = error.errors()[0]["loc"]
        if error.errors()[0]["type"] == "value_error" and place:  # an arm does not know its name
            fault = f"{'.'.join(map(str, place))}.{fault}"
        raise UsageError(f"--config {path}: {fault}") from None
    for place, check in _checks(recipe).items():
        try:
            check()
        except UsageError as error:
            raise UsageError(f"--config {path}: {place}: {error}") from None
    return recipe


def _checks(recipe: StudyRecipe) -> dict[str, Callable[[], object]]:
    """What asks each part of the recipe whether a job would take it."""
    checks: dict[str, Callable[[], object]] = {
        "deepspeed": lambda: read_deepspeed(recipe.deepspeed),
        "env_settings": lambda: check_keys(recipe.env_settings, ("env.",), "does not belong to the environment"),
        "data": lambda: _rehearse(recipe, recipe.data.settings),
        "evaluation": lambda: _check_evaluation(recipe),
        "pretrain": lambda: (_leave_out(recipe.pretrain.settings), recipe.pretrain_config()),
        "label_settings": lambda: check_keys(recipe.label_settings, OPEN_KEYS, "is settled by the critic"),
        "critic": lambda: (_leave_out(recipe.critic.settings), recipe.critic_config()),
        "policy": lambda: _leave_out(recipe.policy.settings),
        "joint": lambda: _leave_out(recipe.joint.settings if recipe.joint is not None else ()),
    }
    for name, arm in recipe.arms.items():
        checks[f"arms.{name}"] = lambda arm=arm: _check_arm(recipe, arm)
        if arm.after is not None:
            checks[f"arms.{name}.after.collect"] = lambda of=arm.after.collect: _rehearse(recipe, of.settings)
    return checks


def _check_arm(recipe: StudyRecipe, arm: Arm) -> None:
    _leave_out(arm.settings)
    config = recipe.policy_config(arm)
    if arm.method != "recap":
        return
    check_keys(arm.labels, ASSIGN_KEYS, "does not change labels of stored values")
    check_agree(recipe.critic_config(*arm.labels), config)


def _check_evaluation(recipe: StudyRecipe) -> None:
    """Every task needs an episode, and the last seed's scenes have to be seeds too."""
    evaluation = recipe.evaluation
    last_seed = max(unit.seed for unit in recipe.units())
    _rehearse(recipe, evaluation.settings, f"evaluation.rollout_seed={recipe.first_scene(last_seed + 1) - 1}")
    kind, _, tasks = recipe.env.partition(":")
    num_tasks = len(tasks.split(",")) if kind == "metaworld" else 1  # of others only the environment itself knows
    if evaluation.episodes < num_tasks:
        raise UsageError(f"episodes: {evaluation.episodes} are too few for the {num_tasks} tasks of {recipe.env}")


def _rehearse(recipe: StudyRecipe, settings: Sequence[str], *own: str) -> PiStarRECAPConfig:
    """As a job reads them that plays episodes."""
    _leave_out(settings)
    return load_config(None, [*recipe.env_settings, *settings, *own])


def _leave_out(settings: Sequence[str]) -> None:
    for text in settings:
        if text.partition("=")[0] in OWN_KEYS:
            raise UsageError(f"settings: leave out '{text}', the study says that itself")
