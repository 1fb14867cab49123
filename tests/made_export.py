"""Exports that no run made: random but awake policies, and what they would agree on with a robot."""

from pathlib import Path

from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.shard_set import ShardSet
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Normalizer
from tests.tiny import wake

# Of no shards at all.
CONTRACT = RobotContract(
    cameras=("front", "wrist"),
    image_size=32,
    state_dim=4,
    action_dim=5,
    fps=10.0,
    tasks={"reach": TaskContract(prompt="reach the cube", max_length=50)},
    normalizer={"method": "mean_std"},
    manifest_hash="0" * 64,
)
# What a stage builds: (overrides of tiny_config, its heads).
HEADS_OF_STAGES = {
    "distributional": ({"training": {"stage": "critic"}, "value": {"critic": "distributional"}}, ("critic",)),
    "iql": ({"training": {"stage": "critic"}}, ("critic", "target_critic")),
    "policy": ({"training": {"stage": "policy"}, "data": {"labels": "some"}}, ("action_expert",)),
}


def contract_of(shard_set: ShardSet, config: PiStarRECAPConfig) -> RobotContract:
    """As training on ``shard_set`` writes it."""
    manifest = shard_set.manifest
    statistics = manifest.merged_statistics("state"), manifest.merged_statistics("actions")
    return RobotContract(
        cameras=manifest.cameras,
        image_size=config.model.image_size,
        state_dim=manifest.state_dim,
        action_dim=manifest.action_dim,
        fps=manifest.fps,
        tasks={
            name: TaskContract(prompt=task.prompt, max_length=task.longest) for name, task in manifest.tasks.items()
        },
        normalizer=Normalizer.of(*statistics, config).to_dict(),
        manifest_hash=manifest.content_hash(),
    )


def save_made(folder: Path, shard_set: ShardSet, config: PiStarRECAPConfig, seed: int = 0) -> RobotContract:
    """An export of ``config`` over ``shard_set``, so awake that every sample has another value."""
    policy, contract = PiStarRECAPPolicy(config), contract_of(shard_set, config)
    wake(policy, seed)
    save_pretrained(policy, contract, folder)
    return contract
