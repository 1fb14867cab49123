"""Meta-World v3 (MuJoCo): any of its tasks, its scripted experts, and pictures that a machine without a GPU can afford.

A policy sees the gripper's position and opening (4 numbers) and pictures; the goal is in the pictures alone. The expert
and the progress measure read the full state. An action is (dx, dy, dz, gripper) in [-1, 1].

Shadows and reflections are off: they cost twelve times the rest in software. ``max_mesh_faces`` leaves out meshes of
more faces, the arm's for the most part; gripper fingers, objects and the goal stay.
"""

import os
import warnings

import numpy as np

from recap_ds.envs.interface import Environment, EnvSpec, StepResult, choose_views
from recap_ds.envs.packages import GRAPHICS, import_simulator
from recap_ds.errors import UsageError

CAMERAS = ("corner2", "corner", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
MAX_STEPS, FPS = 500, 80.0
STATE_DIM, ACTION_DIM = 4, 4
# Geoms of the groups from here on are not drawn.
HIDDEN_GROUP = 5
INSTALL = "pip install 'recap_ds[metaworld]'"


class MetaWorld(Environment):
    def __init__(
        self,
        name: str,
        tasks: str,
        views: dict[str, str] | None,
        size: int,
        max_steps: int | None = None,
        max_mesh_faces: int | None = None,
    ) -> None:
        # The experts' own gains exceed the bounds; everyone here clips.
        warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high", category=UserWarning)
        self._classes = import_simulator("metaworld.env_dict", name, INSTALL).ALL_V3_ENVIRONMENTS
        self._mujoco = import_simulator("mujoco", name, INSTALL)
        self._experts = import_simulator("metaworld.policies", name, INSTALL).ENV_POLICY_MAP
        chosen = tasks.split(",") if tasks else []
        if unknown := [task for task in chosen if task not in self._classes] or not chosen:
            said = f"has no task '{unknown[0]}'" if chosen else "name a task, as in metaworld:reach-v3"
            raise UsageError(f"--env {name}: {said}; there are {', '.join(self._classes)}")
        self._views = choose_views(name, views, CAMERAS, default="corner2")
        self._size, self._max_mesh_faces = size, max_mesh_faces
        self._worlds = {}
        self._renderers = {}
        self.spec = EnvSpec(
            name=name,
            tasks={task: _prompt(task) for task in chosen},
            cameras=tuple(self._views),
            image_size=size,
            state_dim=STATE_DIM,
            action_low=np.full(ACTION_DIM, -1.0),
            action_high=np.full(ACTION_DIM, 1.0),
            fps=FPS,
            max_steps=max_steps or MAX_STEPS,
            has_expert=True,
            gripper_dim=ACTION_DIM - 1,
        )

    def reset(self, seed: int, task: str) -> None:
        if task not in self._worlds:
            self._worlds[task] = self._build(task)
        self._task, self._world = task, self._worlds[task]
        self._world.seed(seed)
        self._world.reset()
        # Where objects and goal were put is in the model; until MuJoCo has looked, pictures and positions show the
        # draw before it (metaworld 3.1 draws twice in a reset). Twice: an observation holds the one before it.
        self._mujoco.mj_forward(self._world.model, self._world.data)
        for _ in range(2):
            self._full_state = self._world._get_obs()
        self._expert = self._experts[task]()
        self._reward = 0.0

    def _build(self, task: str):
        world = self._classes[task]()
        # Its own way to a new goal at every reset, drawn from the seed, and to a state that holds the goal.
        world._freeze_rand_vec, world.seeded_rand_vec, world._set_task_called = False, True, True
        world._partially_observable = False
        del world.sawyer_observation_space  # a cached property of the flag before it
        world.max_path_length = self.spec.max_steps
        return world

    def step(self, action: np.ndarray) -> StepResult:
        self._full_state, reward, terminated, _, info = self._world.step(np.asarray(action, dtype=np.float64))
        self._reward = float(reward)
        success = bool(info["success"])
        return StepResult(self._reward, success, terminated=success or bool(terminated))

    def state(self) -> np.ndarray:
        return self._full_state[:STATE_DIM].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        if self._task not in self._renderers:
            self._renderers[self._task] = self._build_renderer()
        renderer = self._renderers[self._task]
        pictures = {}
        for name, camera in self._views.items():
            renderer.update_scene(self._world.data, camera=camera)
            picture = renderer.render()
            # The corner cameras hang upside down: their upward axis points to the floor.
            upward = self._world.data.camera(camera).xmat.reshape(3, 3)[2, 1]
            pictures[name] = np.ascontiguousarray(picture[::-1, ::-1]) if upward < 0 else picture
        return pictures

    def _build_renderer(self):
        model = self._world.model
        mujoco = self._mujoco
        # The buffer it draws in; a renderer of a larger picture is refused.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self._size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self._size)
        try:
            renderer = mujoco.Renderer(model, self._size, self._size)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            renderer_name = os.environ["MUJOCO_GL"]
            raise UsageError(
                f"--env {self.spec.name}: MUJOCO_GL={renderer_name} cannot draw here ({error}); {GRAPHICS}"
            ) from None
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        if self._max_mesh_faces is not None:
            is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
            faces = model.mesh_facenum[np.where(is_mesh, model.geom_dataid, 0)]
            # Groups matter to drawing alone; contacts do not read them.
            model.geom_group[is_mesh & (faces > self._max_mesh_faces)] = HIDDEN_GROUP
        return renderer

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()

    def expert_action(self) -> np.ndarray:
        return np.clip(self._expert.get_action(self._full_state), -1.0, 1.0)

    def progress(self) -> float:
        """The task's shaped reward, in [0, 10]."""
        return self._reward


def _prompt(task: str) -> str:
    """button-press-topdown-v3 -> button press topdown."""
    return task.removesuffix("-v3").replace("-", " ")
