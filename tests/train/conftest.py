import pytest

from recap_ds.envs.scripted import write_reach_shards


@pytest.fixture(scope="session")
def reach_shards(tmp_path_factory) -> str:
    """A folder of the built-in task's shards, a few episodes of each source."""
    folder = tmp_path_factory.mktemp("reach") / "shards"
    write_reach_shards(folder, num_demo=6, num_auto=6, num_intervention=4, size=32)
    return str(folder)
