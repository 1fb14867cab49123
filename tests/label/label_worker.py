"""Ranks of a label job: ``export shards tag [num_shards]``; with the last, killed after so many shards of its own."""

import os
import signal
from pathlib import Path

from recap_ds.distributed.runtime import Runtime
from recap_ds.label.job import label_shards, open_label_job
from tests.distributed.harness import worker_main


def scenarios(runtime: Runtime, export: str, shards: str, tag: str, num_shards: str = "") -> dict:
    job = open_label_job(Path(export), shards, tag, [])
    lines = []

    def report(line: str) -> None:
        lines.append(line)
        if num_shards and len(lines) == int(num_shards):
            os.kill(os.getpid(), signal.SIGKILL)

    record = label_shards(job, runtime, report)
    return {"lines": lines, "has_record": record is not None}


if __name__ == "__main__":
    worker_main(scenarios)
