import signal
import subprocess
import sys

import pytest

from recap_ds.config import DataConfig
from recap_ds.data.workers import worker_options

# A training process that answers every signal itself, and leaves with its loader still in use.
SCRIPT = """
import itertools, os, signal, sys, time
from torch.utils.data import DataLoader
from recap_ds.config import DataConfig
from recap_ds.data.workers import worker_options

if __name__ == "__main__":
    seen = []
    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, lambda number, frame: seen.append(number))
    loader = DataLoader(list(range(10_000)), **worker_options(DataConfig(num_workers=2)))
    batches = iter(loader)
    next(batches)
    for number in signals:
        os.killpg(0, number)
    time.sleep(0.3)
    later = [int(batch) for batch in itertools.islice(batches, 300)]
    assert later == list(range(1, 301)), later
    assert set(seen) == set(signals), seen
    print("read on", flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(75)
"""


@pytest.mark.parametrize("ending, code", [("exits", 75), ("killed", -signal.SIGKILL)])
def test_workers_outlive_the_signals_of_a_preemption_and_not_the_training_process(tmp_path, ending, code):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # In its own session: the signals go to its process group. Workers left over would hold its output open: no end.
    done = subprocess.run(
        [sys.executable, script, ending],
        capture_output=True,
        text=True,
        timeout=90,
        start_new_session=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "read on\n"), done.stderr


@pytest.mark.parametrize("num_workers, prefetch_batches, per_worker", [(1, 4, 4), (2, 4, 2), (3, 4, 2), (8, 4, 1)])
def test_prefetch_is_counted_over_all_workers(num_workers, prefetch_batches, per_worker):
    options = worker_options(DataConfig(num_workers=num_workers, prefetch_batches=prefetch_batches))
    assert options["num_workers"] == num_workers and options["prefetch_factor"] == per_worker
