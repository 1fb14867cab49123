"""``--env NAME`` becomes an environment.

    reach, reach:TASK              the built-in task; without a TASK both of them, in turn
    metaworld:TASK[,TASK...]       Meta-World v3 (pip install 'recap_ds[metaworld]')
    pusht                          gym-pusht (pip install 'recap_ds[pusht]')
    gym:ID, gym:MODULE:ID          any gymnasium id; MODULE is imported first and registers it
    MODULE:CLASS                   any class with gymnasium's calls

Simulators are imported when one of theirs is asked for.
"""

from recap_ds.config import EnvConfig
from recap_ds.envs.interface import Environment
from recap_ds.errors import UsageError

DEFAULT_IMAGE_SIZE = 96


def open_environment(
    name: str, settings: EnvConfig, cameras: tuple[str, ...] | None = None, image_size: int | None = None
) -> Environment:
    """``cameras``, ``image_size``: those of the policy that is to act, where there is one.

    UsageError where there is no such environment, or it cannot show what the policy looks at.
    """
    kind, _, rest = name.partition(":")
    size = settings.image_size or image_size or DEFAULT_IMAGE_SIZE
    views = _views(settings, cameras)
    _refuse_unread(kind, settings)
    if kind == "reach":
        from recap_ds.envs.reach_world import ReachWorld

        return ReachWorld(name, rest, views, size, settings.max_steps)
    if kind == "metaworld":
        from recap_ds.envs.metaworld import MetaWorld

        return MetaWorld(name, rest, views, size, settings.max_steps, settings.max_mesh_faces)
    if name == "pusht":
        from recap_ds.envs.pusht import PushT

        return PushT(views, size, settings.max_steps)
    if rest:
        from recap_ds.envs.gymnasium import GymnasiumWorld

        return GymnasiumWorld(name, views, size, settings)
    raise UsageError(f"--env {name}: unknown; there are reach, metaworld:TASK, pusht, gym:ID and MODULE:CLASS")


def _views(settings: EnvConfig, cameras: tuple[str, ...] | None) -> dict[str, str] | None:
    """The policy's camera -> the environment's; None = whatever the environment shows by default."""
    views = settings.cameras
    if cameras is None:
        return views
    if views is None:
        return {camera: camera for camera in cameras}
    if missing := sorted(set(cameras) - views.keys()):
        raise UsageError(f"env.cameras: the policy looks through '{missing[0]}', which is not there; add it")
    return {camera: views[camera] for camera in cameras}


def _refuse_unread(kind: str, settings: EnvConfig) -> None:
    """A setting that this kind of environment does not read would be taken for one that works."""
    own = {"reach": set(), "pusht": set(), "metaworld": {"max_mesh_faces"}}
    readable = own.get(kind, {"fps", "state_key", "success_key", "options"})
    readable |= {"cameras", "image_size", "max_steps", "prompts"}
    for key, value in settings.model_dump(exclude_unset=True).items():
        if key not in readable and value != EnvConfig.model_fields[key].get_default(call_default_factory=True):
            raise UsageError(f"env.{key}: is not read by --env {kind}; leave it out")
