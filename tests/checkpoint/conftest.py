"""One launch of two ranks for all tests of checkpoints, and a runtime of one rank in this process."""

import os

import pytest
import torch

from tests.distributed.harness import run_ranks


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """(folder with runs, what each rank reported): see checkpoint_worker."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks("checkpoint.checkpoint_worker", 2, str(folder), timeout_seconds=400.0)


@pytest.fixture(scope="session")
def runtime():
    """DeepSpeed in this process; the environment is put back for tests that look at it."""
    from recap_ds.distributed.runtime import RankInfo, start_runtime, stop_runtime

    environment, num_threads = dict(os.environ), torch.get_num_threads()
    live = start_runtime(RankInfo())
    yield live
    stop_runtime()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def one_rank(runtime):
    """A tiny run with a frozen VLM in this process."""
    from tests.checkpoint.hand_made import make_config
    from tests.checkpoint.tiny_run import start

    return start(make_config("frozen"), runtime)
