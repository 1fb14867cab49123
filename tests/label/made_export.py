"""A critic's export over the tiny shards: random but awake, so that every sample has another value."""

from pathlib import Path

from recap_ds.data.shard_set import ShardSet
from tests.made_export import save_made
from tests.tiny import tiny_config


def save_critic(folder: Path, shard_set: ShardSet, critic: str, seed: int = 0) -> Path:
    config = tiny_config(
        max_action_dim=3,
        model={"max_prompt_tokens": 20, "image_size": 32},
        data={"num_workers": 0},
        value={"critic": critic},
        training={"stage": "critic"},
        label={"lookahead": 3, "batch_size": 6, "source": critic},
    )
    save_made(folder, shard_set, config, seed)
    return folder
