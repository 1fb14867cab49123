"""Scripted episodes of the reach task, in the three kinds RECAP learns from, and the shard folder made of them.

demo           an expert with a little noise: always succeeds
auto           a mediocre policy: slow, biased, noisy, and three times in ten it goes to the wrong target
intervention   the same policy, until a person takes over and finishes the task

Pictures are rendered when the writer asks for them. T = frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recap_ds.config import SOURCES, SourceName
from recap_ds.data.episodes import Episode
from recap_ds.data.manifest import Manifest
from recap_ds.data.writer import Progress, write_shards
from recap_ds.envs.reach import FPS, MAX_STEPS, PROMPTS, Scene, expert_action, is_success, move, render, sample_scene

DATASET = "reach"
_EXPERT_NOISE, _POLICY_NOISE = 0.1, 0.35
_WRONG_TARGET_FRACTION = 0.3


@dataclass(frozen=True)
class ReachFrames:
    """FrameReader of one episode: renders, so that nothing but positions is kept."""

    scene: Scene
    positions: np.ndarray  # [T, 2]
    cameras: tuple[str, ...]
    size: int

    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        return {
            camera: np.stack([render(self.positions[frame], self.scene, camera, self.size) for frame in frames])
            for camera in self.cameras
        }


class _Trajectory(NamedTuple):
    states: np.ndarray  # [T, 4]
    actions: np.ndarray  # [T, 2]
    human: np.ndarray  # [T] bool
    success: bool


def scripted_episodes(
    kind: SourceName, num_episodes: int, seed: int, size: int = 64, cameras: tuple[str, ...] = ("top",)
) -> Iterator[Episode]:
    """Episodes ``reach/<kind>-0000`` and on, each a function of (kind, seed, its number)."""
    for number in range(num_episodes):
        generator = np.random.default_rng([seed, SOURCES.index(kind), number])
        while True:
            scene = sample_scene(generator, task=list(PROMPTS)[number % len(PROMPTS)])
            trajectory = _roll_out(kind, scene, generator)
            # Demonstrations and corrections are kept only if they end well, corrections only if a person was needed.
            if kind == "auto" or (trajectory.success and trajectory.human.any()):
                break
        yield Episode(
            name=f"{DATASET}/{kind}-{number:04d}",
            task=scene.task,
            prompt=PROMPTS[scene.task],
            source=kind,
            outcome="success" if trajectory.success else "failure",
            fps=FPS,
            states=trajectory.states,
            actions=trajectory.actions,
            read_frames=ReachFrames(scene, trajectory.states[:, :2].astype(np.float64), cameras, size),
            human=trajectory.human if kind == "intervention" else None,
            origin=f"recap_ds.envs.scripted seed {seed}",
        )


def write_reach_shards(
    out: str | Path,
    *,
    num_demo: int = 24,
    num_auto: int = 24,
    num_intervention: int = 12,
    seed: int = 0,
    chunk_size: int = 10,
    size: int = 64,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """A small tagged shard folder in a few seconds: the quickstart's data."""

    def episodes() -> Iterator[Episode]:
        yield from scripted_episodes("demo", num_demo, seed, size)
        yield from scripted_episodes("auto", num_auto, seed, size)
        yield from scripted_episodes("intervention", num_intervention, seed, size)

    report = write_shards(
        out,
        episodes(),
        dataset=DATASET,
        action_width=chunk_size,
        td_horizon=chunk_size,
        image_size=size,
        jobs=jobs,
        seed=seed,
        progress=progress,
    )
    return report.manifest


def _roll_out(kind: SourceName, scene: Scene, generator: np.random.Generator) -> _Trajectory:
    # The mediocre policy's habits, fixed for the episode.
    speed, bias = generator.uniform(0.4, 0.9), generator.normal(0.0, 0.2, size=2)
    is_confused = generator.random() < _WRONG_TARGET_FRACTION
    goal = scene.targets.sum(axis=0) - scene.target if is_confused else scene.target
    takeover = {"demo": 0, "auto": MAX_STEPS, "intervention": int(generator.integers(4, 11))}[kind]
    position, velocity = scene.start, np.zeros(2)
    states, actions, human = [], [], []
    success = False
    while not success and len(states) < MAX_STEPS:
        is_human = len(states) >= takeover
        if is_human:
            action = expert_action(position, scene.target) + generator.normal(0.0, _EXPERT_NOISE, size=2)
        else:
            action = speed * expert_action(position, goal) + bias + generator.normal(0.0, _POLICY_NOISE, size=2)
        action = np.clip(action, -1.0, 1.0)
        states.append(np.concatenate([position, velocity]))
        actions.append(action)
        human.append(is_human)
        position, velocity = move(position, action)
        success = is_success(position, scene)
    return _Trajectory(
        np.array(states, dtype=np.float32), np.array(actions, dtype=np.float32), np.array(human), success
    )
