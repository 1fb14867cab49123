"""What the launcher's variables mean."""

import os
import socket
import subprocess
import sys

import pytest

from recap_ds.distributed.runtime import RankInfo, read_rank_info
from recap_ds.errors import UsageError

LAUNCHED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_without_a_launcher_there_is_one_process():
    info = read_rank_info({"MASTER_PORT": "1234", "WORLD_SIZE": "4"})
    assert info == RankInfo(rank=0, local_rank=0, world=1, local_world=1)
    assert info.is_main


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_torchrun_and_deepspeed_name_the_local_world_differently(name):
    info = read_rank_info(LAUNCHED | {name: "4"})
    assert info == RankInfo(rank=5, local_rank=1, world=8, local_world=4)
    assert not info.is_main


def test_a_launcher_may_leave_the_local_world_out():
    assert read_rank_info(LAUNCHED).local_world == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "contradict"),
        ({"LOCAL_RANK": "4", "LOCAL_SIZE": "4"}, "contradict"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' is not a whole number"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        read_rank_info(LAUNCHED | change)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_meeting_point_is_named(name):
    with pytest.raises(UsageError, match=name):
        read_rank_info({key: value for key, value in LAUNCHED.items() if key != name})


def test_a_taken_port_is_named():
    join = "from recap_ds.distributed.runtime import *; start_runtime(read_rank_info(), timeout_seconds=5)"
    with socket.socket() as other_job:
        other_job.bind(("127.0.0.1", 0))
        other_job.listen()
        port = str(other_job.getsockname()[1])
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu"}
        environment = os.environ | launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # A process of its own: DeepSpeed joins one group per process, whatever it is asked later.
        command = [sys.executable, "-c", join]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"UsageError: MASTER_PORT {port} is taken" in done.stderr and "--master_port" in done.stderr
