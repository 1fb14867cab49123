"""Gates can fail: a critic of returns that say nothing is at chance, one of the true returns far from it.

Episodes whose pictures tell the return, one camera the time and the other the outcome: a frozen random VLM and a small
head learn them in seconds, which the built-in task takes thousands of steps for.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.data.assemble import Assembler
from recap_ds.data.episodes import Episode
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.data.loader import TransitionDataset
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.verify import verify_shards
from recap_ds.evaluate.offline import value_figures
from recap_ds.evaluate.records import collect_records
from recap_ds.models.losses import normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import build_tokenizer
from tests.data.tiny_shards import SIZE, flat_episode, mixed_set, scale_of, write_tiny
from tests.shuffled_returns import write_shuffled
from tests.tiny import tiny_config

NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 150, 16, 1e-2
CONFIG = tiny_config(
    max_action_dim=3,
    max_state_dim=4,
    model={"max_prompt_tokens": 40, "image_size": SIZE, "conv_stem": True},
    data={"num_workers": 0, "held_out_fraction": 0.25},
    value={"critic": "distributional", "target": "hl_gauss", "reads_state": False},
    training={"stage": "critic"},
    evaluation={"max_samples": 512, "batch_size": 64},
)


@dataclass(frozen=True)
class TellingPictures:
    failed: bool

    def __call__(self, frames: list[int]) -> dict[str, np.ndarray]:
        levels = {"left": [20 + 9 * t for t in frames], "right": [230 if self.failed else 20] * len(frames)}
        shape = len(frames), SIZE, SIZE, 3
        return {
            camera: np.broadcast_to(np.array(column, np.uint8)[:, None, None, None], shape).copy()
            for camera, column in levels.items()
        }


def telling_episode(number: int) -> Episode:
    outcome, task = ("failure", "success", "success")[number % 3], ("cube", "cup")[number % 2]
    episode = flat_episode(number, 20 + number % 5, "auto", outcome=outcome, task=task)
    return replace(episode, read_frames=TellingPictures(outcome == "failure"))


def gates_after_training(folder: Path) -> dict[str, Any]:
    shards = ShardSet.open(folder)
    manifest = shards.manifest
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), CONFIG)
    assembler = Assembler(shards, CONFIG, build_tokenizer("tiny"), normalizer, scale_of(CONFIG, manifest))
    data, policy = TransitionDataset(assembler, CONFIG, slots_per_step=1), PiStarRECAPPolicy(CONFIG)
    optimizer = torch.optim.AdamW(policy.parameter_groups())
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10)
        loss = policy.training_step(data.batch(np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    scale = AdvantageScale(*(torch.zeros(len(manifest.tasks)) for _ in range(3)))
    records = collect_records(
        lambda batch: policy(batch, "evaluate", scale, normalizers(torch.ones(4)), False),
        EvaluationBatches(assembler, CONFIG, rank=0, world=1),
        torch.device("cpu"),
    )
    return value_figures(records, np.ones(len(records.task), bool))


@pytest.fixture(scope="module")
def telling(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("telling") / "true"
    write_tiny(folder, [telling_episode(i) for i in range(40)], samples_per_shard=256)
    return folder


def test_a_critic_of_the_true_returns_passes_every_gate(telling):
    gates = gates_after_training(telling)
    assert gates["num_samples"] > 150
    assert gates["rank_correlation"] > 0.8 and gates["separation"] > 0.95
    assert gates["mae"] < 0.5 * gates["constant_mae"] and gates["shuffled_image_gap"] > 1.0


def test_a_critic_of_returns_that_say_nothing_fails_every_gate(telling):
    write_shuffled(telling, telling.with_name("shuffled"))
    gates = gates_after_training(telling.with_name("shuffled"))
    assert gates["num_samples"] > 150
    assert abs(gates["rank_correlation"]) < 0.25 and abs(gates["separation"] - 0.5) < 0.15
    assert gates["mae"] > 0.9 * gates["constant_mae"] and abs(gates["shuffled_image_gap"]) < 0.1


def test_only_what_frames_show_changes_places(tmp_path):
    before = mixed_set(tmp_path / "true")
    manifest = write_shuffled(before.folder, tmp_path / "shuffled", seed=3)
    after = ShardSet.open(tmp_path / "shuffled")
    assert not verify_shards(after.folder)
    fields = ("source", "task", "episode_length", "outcome", "control", "num_valid", "next_offset")

    def facts(shards: ShardSet) -> dict[tuple[str, int], tuple]:
        columns = [getattr(shards.table, name).tolist() for name in fields] + [shards.held_out(0.3).tolist()]
        places = zip(shards.table.episode.tolist(), shards.table.frame.tolist(), strict=True)
        rows = zip(*columns, strict=True)
        return {(shards.episodes[e], t): row for (e, t), row in zip(places, rows, strict=True)}

    assert facts(after) == facts(before)
    for key in ("cameras", "td_horizon", "has_next", "has_rewards", "tasks", "counts"):
        assert getattr(manifest, key) == getattr(before.manifest, key), key
    assert manifest.content_hash() != before.manifest.content_hash()

    def shown(shards: ShardSet, task: int) -> list[bytes]:
        members = [shards.read_members(i) for i in np.flatnonzero(shards.table.task == task).tolist()]
        return [part["state.npy"] + part["left.jpg"] for part in members]

    for task in range(2):
        assert shown(after, task) != shown(before, task) and sorted(shown(after, task)) == sorted(shown(before, task))
