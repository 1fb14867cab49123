"""What a study's results follow from, as plain values: two recipes that agree in them make the same units.

They stand in the results file and in the study's folder, so that neither is ever taken for another recipe's.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.recipe import build_config, changed_keys, is_among
from recap_ds.study.recipe import OWN_KEYS, Collection, StudyRecipe
from recap_ds.train.run_folder import FREE_KEYS

# Free to differ when one run goes on, and yet not between two that are compared: evaluation chooses the critic's
# checkpoint and says how a policy acts, and on one rank the sizes make the global batch.
DECISIVE_KEYS = (
    "evaluation.",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.global_batch_size",
    # The study says them, by the arm's method.
    "training.stage",
    "data.labels",
)
HARMLESS_KEYS = ("evaluation.num_envs", "evaluation.num_videos")
IGNORED_KEYS = tuple(key for key in (*FREE_KEYS, *OWN_KEYS, *HARMLESS_KEYS) if key not in DECISIVE_KEYS)
ANOTHER_RECIPE = "give the recipe they were made with, or another --out and another --results"


def shared_facts(recipe: StudyRecipe) -> dict[str, Any]:
    """All that every unit follows from, as it is and not as it is called."""
    return {
        "env": recipe.env,
        "env_settings": _settings(recipe.env_settings),
        "deepspeed": read_deepspeed(recipe.deepspeed),
        "data": _collection(recipe.data),
        "critic_seed": recipe.critic_seed,
        "label_settings": _settings(recipe.label_settings),
        "evaluation": {
            "episodes": recipe.evaluation.episodes,
            "first_scene": recipe.evaluation.first_scene,
            "settings": _settings(recipe.evaluation.settings),
        },
        "pretrain": training_facts(recipe.pretrain_config()),
        "critic": training_facts(recipe.critic_config()),
    }


def arm_facts(recipe: StudyRecipe, name: str) -> dict[str, Any]:
    """What is an arm's own, and all of the arm whose policy it needs."""
    arm = recipe.arms[name]
    return {
        "method": arm.method,
        "labels": _settings(arm.labels),
        "guidance_betas": list(arm.guidance_betas),
        "after": arm.after and {**arm.after.model_dump(), "collect": _collection(arm.after.collect)},
        "policy_of": arm.policy_of,
        "policy": training_facts(recipe.policy_config(arm)),
        "needs": arm.needs and arm_facts(recipe, arm.needs),
    }


def training_facts(config: PiStarRECAPConfig) -> dict[str, Any]:
    """Of a training: what decides what it learns, and how its policy acts."""
    facts: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            facts[section] = {key: of for key, of in value.items() if not is_among(f"{section}.{key}", IGNORED_KEYS)}
        elif not is_among(section, IGNORED_KEYS):
            facts[section] = value
    return {section: value for section, value in facts.items() if value != {}}


def changed_shared_facts(there: dict[str, Any], recipe: StudyRecipe) -> list[str]:
    """Names of the facts in which ``there``, which were written down, are other than the recipe's."""
    return changed_keys(_as_of_today(there, "pretrain", "critic"), shared_facts(recipe))


def changed_arm_facts(there: dict[str, Any], recipe: StudyRecipe, arm: str) -> list[str]:
    return changed_keys(_arm_as_of_today(there), arm_facts(recipe, arm))


def read_deepspeed(path: str) -> dict[str, Any]:
    """What is in DeepSpeed's file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UsageError(f"{path}: is not JSON") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: is not an object of JSON")
    return values


def _arm_as_of_today(facts: dict[str, Any]) -> dict[str, Any]:
    needs = facts["needs"]
    return _as_of_today(facts, "policy") | {"needs": needs and _arm_as_of_today(needs)}


def _as_of_today(facts: dict[str, Any], *trainings: str) -> dict[str, Any]:
    """Keys that are newer than the results take their defaults: they were trained as these say."""
    return facts | {training: training_facts(build_config(facts[training])) for training in trainings}


def _collection(collection: Collection) -> dict[str, Any]:
    return collection.model_dump() | {"settings": _settings(collection.settings)}


def _settings(texts: Sequence[str]) -> dict[str, str]:
    """By their keys: the last word on one counts, and their order does not."""
    pairs: Iterable[tuple[str, str, str]] = (text.partition("=") for text in texts)
    return {key: value for key, _, value in pairs if not is_among(key, IGNORED_KEYS)}
