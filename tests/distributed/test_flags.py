"""Flags agreed over ranks, a step late. Real ranks, but without DeepSpeed: the exchange knows nothing of it."""

import json
from pathlib import Path

import torch.distributed
import torch.multiprocessing

from recap_ds.distributed.flags import FlagExchange, StepFlags
from recap_ds.distributed.runtime import wait_for_file

NUM_STEPS = 5
# Who says what at which step: rank -> step -> flags.
SAID = {
    0: {2: StepFlags(writing=1), 3: StepFlags(writing=1), 4: StepFlags(stop=9)},
    1: {1: StepFlags(stop=3), 3: StepFlags(stop=2)},
}
AGREED = [
    StepFlags(),
    StepFlags(),
    StepFlags(stop=3),
    StepFlags(writing=1),
    StepFlags(stop=2, writing=1),
]


def exchange_all(rank: int) -> list[StepFlags]:
    flags = FlagExchange()
    agreed = [flags.exchange(SAID[rank].get(step, StepFlags())) for step in range(NUM_STEPS)]
    flags.close()
    return agreed


def check_posting_does_not_wait(rank: int, posted: Path) -> None:
    """Rank 1 posts only once rank 0 has: an exchange that waited would wait for ever."""
    flags = FlagExchange()
    if rank == 1:
        wait_for_file(posted, 30.0, "rank 0 waits in its first exchange: nothing was posted")
    flags.exchange(StepFlags())
    posted.touch()
    flags.close()


def rank_main(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    check_posting_does_not_wait(rank, Path(folder, "posted"))
    result = {"agreed": exchange_all(rank), "again": exchange_all(rank)}
    torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def test_every_rank_reads_the_largest_of_the_step_before(tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for trial in ("agreed", "again"):  # a second exchange in the same process begins anew
            assert [StepFlags(*flags) for flags in result[trial]] == AGREED


def test_one_process_reads_its_own_of_the_step_before():
    flags = FlagExchange()
    assert flags.exchange(StepFlags(stop=1)) == StepFlags()
    assert flags.exchange(StepFlags(writing=1)) == StepFlags(stop=1)
    assert flags.exchange(StepFlags()) == StepFlags(writing=1)
    flags.close()
