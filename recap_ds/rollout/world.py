"""Does the world fit the policy? Said before anything starts; and how the two call the same task.

A policy knows its tasks from the shards it learned from. Where it knows the environment's task, by its identifier or by
what it is told, the shards' names are used: so that episodes collected here join those it was trained on.
"""

from typing import NamedTuple

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.envs.interface import EnvSpec
from recap_ds.errors import UsageError
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.tokens import clean_prompt
from recap_ds.rollout.workers import WorldSettings

# The least difference between two control rates that is worth a word.
FPS_TOLERANCE = 0.01


class KnownTask(NamedTuple):
    """A task of the environment, as the policy and its shards call it."""

    name: str
    prompt: str


class World(NamedTuple):
    settings: WorldSettings
    spec: EnvSpec
    tasks: dict[str, KnownTask]  # by the environment's name
    notes: list[str]  # what is allowed and probably not meant


def open_world(name: str, env: EnvConfig, contract: RobotContract | None, image_size: int | None = None) -> World:
    """Builds the environment once, looks, and closes it: what is missing or does not fit is a UsageError here.

    ``image_size``: of the shards, where it is known; else that of the policy's own pictures.
    """
    cameras = contract.cameras if contract is not None else None
    size = image_size or (contract.image_size if contract is not None else None)
    settings = WorldSettings(name, env, cameras, size)
    world = open_environment(*settings)
    try:
        spec = world.spec
        world.reset(0, next(iter(spec.tasks)))
        world.images()
    finally:
        world.close()
    for task in env.prompts:
        if task not in spec.tasks:
            raise UsageError(f"env.prompts.{task}: --env {name} has no such task; it has {', '.join(spec.tasks)}")
    told = {task: clean_prompt(env.prompts.get(task, prompt)) for task, prompt in spec.tasks.items()}
    if contract is None:
        return World(settings, spec, {task: KnownTask(task, prompt) for task, prompt in told.items()}, [])
    _check_dims(spec, contract)
    tasks = {task: _known(task, prompt, contract, task in env.prompts) for task, prompt in told.items()}
    return World(settings, spec, tasks, _notes(spec, tasks, contract))


def _check_dims(spec: EnvSpec, contract: RobotContract) -> None:
    for what, there, trained in (
        ("state dims", spec.state_dim, contract.state_dim),
        ("action dims", spec.action_dim, contract.action_dim),
    ):
        if there != trained:
            raise UsageError(f"--env {spec.name}: has {there} {what}, the policy was trained on {trained}")


def _known(task: str, prompt: str, contract: RobotContract, is_given: bool) -> KnownTask:
    if task in contract.tasks:
        return KnownTask(task, prompt if is_given else contract.tasks[task].prompt)
    for name, known in contract.tasks.items():
        if clean_prompt(known.prompt) == prompt:
            return KnownTask(name, known.prompt)
    return KnownTask(task, prompt)


def _notes(spec: EnvSpec, tasks: dict[str, KnownTask], contract: RobotContract) -> list[str]:
    notes = []
    prompts = [known.prompt for known in contract.tasks.values()]
    for task, known in tasks.items():
        if known.prompt not in prompts:
            notes.append(
                f"the policy was never told '{known.prompt}'; if its words are others: env.prompts.{task}=WORDS"
            )
    if abs(spec.fps - contract.fps) > FPS_TOLERANCE * contract.fps:
        notes.append(f"the policy learned at {contract.fps:g} fps, --env {spec.name} runs at {spec.fps:g}")
    return notes
