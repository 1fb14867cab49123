"""Tiny shard folders for the reading tests, through the real writer: every number in them is known in advance.

Frame t of episode e has state [e, t, 1] and action [10 e + t, -t]; its pictures are flat grey: level 40 + t for camera
"left", 200 - t for "right".
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.algo.returns import TaskScale, value_scale
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.episodes import Episode
from recap_ds.data.manifest import Manifest
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.writer import write_shards
from recap_ds.recipe import build_config

SIZE = 16


@dataclass(frozen=True)
class FlatPictures:
    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        levels = {"left": [40 + t for t in frames], "right": [200 - t for t in frames]}
        return {
            camera: np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in column])
            for camera, column in levels.items()
        }


def flat_episode(
    number: int,
    num_frames: int,
    source: str = "demo",
    outcome: str = "success",
    task: str = "cube",
    human: slice | None = None,
) -> Episode:
    t = np.arange(num_frames, dtype=np.float32)
    is_human = None
    if human is not None:
        is_human = np.zeros(num_frames, bool)
        is_human[human] = True
    return Episode(
        name=f"{source}/{number}",
        task=task,
        prompt=f"pick the {task}",
        source=source,
        outcome=outcome,
        fps=10.0,
        states=np.stack([np.full_like(t, number), t, np.ones_like(t)], axis=1),
        actions=np.stack([10 * number + t, -t], axis=1),
        read_frames=FlatPictures(),
        human=is_human,
    )


def write_tiny(folder: Path, episodes: list[Episode], **options) -> ShardSet:
    """Data sets are those of the episodes' names; ``flat_episode`` calls each after its source."""
    settings = {"action_width": 6, "td_horizon": 4, "image_size": SIZE, "samples_per_shard": 16, **options}
    for dataset in sorted({episode.name.rpartition("/")[0] for episode in episodes}):
        mine = [episode for episode in episodes if episode.name.rpartition("/")[0] == dataset]
        write_shards(folder, mine, dataset=dataset, **settings)
    return ShardSet.open(folder)


def mixed_set(folder: Path) -> ShardSet:
    """Three sources, two tasks, a few shards of each source."""
    episodes = [flat_episode(i, 9 + i % 3, task=("cube", "cup")[i % 2]) for i in range(12)]
    episodes += [flat_episode(i, 8, source="auto", outcome=("failure", "success")[i % 2]) for i in range(8)]
    episodes += [flat_episode(i, 10, source="intervention", human=slice(4, 10)) for i in range(6)]
    return write_tiny(folder, episodes)


def tiny_config(**sections) -> PiStarRECAPConfig:
    values = {
        "chunk_size": 4,
        "max_action_dim": 3,
        "max_state_dim": 4,
        "model": {"vlm_model_name": "tiny", "image_size": SIZE, "max_prompt_tokens": 20},
        "data": {"num_workers": 0, "held_out_fraction": 0.0},
        "training": {"batch_size": 8},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return build_config(values)


def scale_of(config: PiStarRECAPConfig, manifest: Manifest) -> TaskScale:
    longest = {name: task.longest for name, task in manifest.tasks.items()}
    return value_scale(config.value, longest, list(manifest.tasks))
