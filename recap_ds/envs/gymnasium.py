"""Any environment with gymnasium's calls: a registered id, or a class of the user's own.

``env.*`` says where things are: ``cameras`` maps the policy's cameras to keys of the observation, or to ``render`` for
the picture that ``render()`` returns (made only when a policy looks); ``state_key`` and ``success_key`` name a key of
the observation and of info. Nested keys are written with slashes. One task, whose name is the environment's.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from recap_ds.config import EnvConfig
from recap_ds.envs.interface import Environment, EnvSpec, StepResult
from recap_ds.envs.packages import import_simulator
from recap_ds.errors import UsageError
from recap_ds.processing.images import resize_with_padding

RENDER = "render"
# As success_key: the episode ends in success or not at all.
TERMINATED = "terminated"


class GymnasiumWorld(Environment):
    def __init__(self, name: str, views: dict[str, str] | None, size: int, settings: EnvConfig) -> None:
        self._name, self._settings, self._size = name, settings, size
        self._views = views or {"front": RENDER}
        self._world = _make(name, dict(settings.options))
        self._observation, _ = self._world.reset(seed=0)
        low, high = self._bounds()
        self.spec = EnvSpec(
            name=name,
            tasks={name: name.partition(":")[2]},
            cameras=tuple(self._views),
            image_size=size,
            state_dim=len(self.state()),
            action_low=low,
            action_high=high,
            fps=settings.fps or self._told("env.fps", self._world.metadata.get("render_fps")),
            max_steps=settings.max_steps or self._told("env.max_steps", self._own_limit()),
            has_expert=False,
        )
        # A wrong key is said now and not after the first chunk.
        self.images()

    def reset(self, seed: int, task: str) -> None:
        self._observation, _ = self._world.reset(seed=seed)
        self._reward = 0.0

    def step(self, action: np.ndarray) -> StepResult:
        action = np.asarray(action, dtype=self._world.action_space.dtype)
        self._observation, reward, terminated, truncated, info = self._world.step(action)
        self._reward = float(reward)
        key = self._settings.success_key
        if key != TERMINATED and key not in info:
            raise UsageError(
                f"env.success_key: info of {self._name} has no '{key}' (it has {sorted(map(str, info))}); name the key "
                f"that says success, or '{TERMINATED}' where an episode ends only by success"
            )
        success = bool(terminated if key == TERMINATED else info[key])
        return StepResult(self._reward, success, terminated=success or bool(terminated), truncated=bool(truncated))

    def state(self) -> np.ndarray:
        key = self._settings.state_key
        value = self._observation if key is None else self._find(key, "env.state_key")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.ndim != 1:
            raise UsageError(f"env.state_key: {key!r} is no vector of numbers in {self._name}; {self._keys()}")
        return value.astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {camera: self._picture(camera, key) for camera, key in self._views.items()}

    def close(self) -> None:
        self._world.close()

    def progress(self) -> float:
        return self._reward

    def _picture(self, camera: str, key: str) -> np.ndarray:
        place = f"env.cameras.{camera}"
        picture = self._rendered(place) if key == RENDER else self._find(key, place)
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            raise UsageError(f"{place}: {key!r} of {self._name} is no uint8 [height, width, 3]; {self._keys()}")
        return resize_with_padding(picture, self._size)

    def _rendered(self, place: str) -> Any:
        try:
            return self._world.render()
        except AssertionError as error:
            # What gymnasium's own classes raise where nobody said how they are to render.
            said = f" ({error})" if str(error) else ""
            raise UsageError(
                f"{place}: {self._name} does not render{said}; give env.options.render_mode=rgb_array"
            ) from None

    def _find(self, key: str, place: str) -> Any:
        value = self._observation
        for part in key.split("/"):
            if not isinstance(value, Mapping) or part not in value:
                raise UsageError(f"{place}: the observation of {self._name} has no '{key}'; {self._keys()}")
            value = value[part]
        return value

    def _keys(self) -> str:
        if isinstance(self._observation, Mapping):
            return f"its keys are {sorted(self._observation)}, and '{RENDER}' for a camera"
        return f"the observation is one array; a camera may be '{RENDER}'"

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        space = self._world.action_space
        box = type(space).__name__ == "Box" and len(space.shape) == 1
        if not box or not np.isfinite([space.low, space.high]).all():
            raise UsageError(f"--env {self._name}: its actions are {space}; a policy here acts in a bounded vector")
        return space.low.astype(np.float64), space.high.astype(np.float64)

    def _own_limit(self) -> int | None:
        # What gymnasium.make was told; a class made without it has none.
        return self._world.spec.max_episode_steps if self._world.spec is not None else None

    def _told(self, key: str, value: Any) -> Any:
        if not value:
            raise UsageError(f"{key}: {self._name} does not say; give {key}=NUMBER")
        return value


def _make(name: str, options: dict[str, Any]) -> Any:
    kind, _, rest = name.partition(":")
    if kind != "gym":
        return _build_class(name, options)
    gymnasium = import_simulator("gymnasium", name, "pip install gymnasium")
    try:
        return gymnasium.make(rest, **{"render_mode": "rgb_array", **options})
    except ImportError as error:
        raise UsageError(f"--env {name}: cannot be imported ({error}); install its package") from None
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        raise UsageError(f"--env {name}: gymnasium cannot make it ({error})") from None


def _build_class(name: str, options: dict[str, Any]) -> Any:
    module, _, attribute = name.partition(":")
    try:
        made = vars(importlib.import_module(module))[attribute]
    except ImportError as error:
        raise UsageError(f"--env {name}: {module} cannot be imported ({error}); is it on PYTHONPATH?") from None
    except KeyError:
        raise UsageError(f"--env {name}: {module} has no '{attribute}'") from None
    try:
        return made(**options)
    except TypeError as error:
        raise UsageError(f"--env {name}: cannot be made ({error}); its arguments are env.options") from None
