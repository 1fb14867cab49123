"""A critic's export over the tiny shards: random but awake, so that every sample has another value."""

from pathlib import Path

from recap_ds.data.shard_set import ShardSet
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Normalizer
from tests.tiny import tiny_config, wake


def save_critic(folder: Path, shard_set: ShardSet, critic: str, seed: int = 0) -> Path:
    config = tiny_config(
        max_action_dim=3,
        model={"max_prompt_tokens": 20, "image_size": 32},
        data={"num_workers": 0},
        value={"critic": critic},
        training={"stage": "critic"},
        label={"lookahead": 3, "batch_size": 6, "source": critic},
    )
    policy = PiStarRECAPPolicy(config)
    wake(policy, seed)
    manifest = shard_set.manifest
    statistics = manifest.merged_statistics("state"), manifest.merged_statistics("actions")
    contract = RobotContract(
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
    save_pretrained(policy, contract, folder)
    return folder
