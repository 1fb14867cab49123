"""Ranks of a rollout evaluation: ``export videos overrides...``."""

from pathlib import Path

from recap_ds.distributed.runtime import Runtime
from recap_ds.evaluate.rollouts import Checkpoint, open_rollouts, play_rollouts
from recap_ds.models.pretrained import load_pretrained
from tests.distributed.harness import worker_main


def scenarios(runtime: Runtime, export: str, videos: str, *overrides: str) -> dict:
    checkpoint = Checkpoint(export, Path(export))
    policy = load_pretrained(export, overrides)
    job = open_rollouts(checkpoint, policy, "reach", 7, runtime.info, other=checkpoint, overrides=overrides)
    gathered = runtime.gather_objects({"rank": runtime.info.rank, "text": "x" * (1 + 5 * runtime.info.rank)})
    return {"records": play_rollouts(job, runtime, Path(videos)).records, "gathered": gathered}


if __name__ == "__main__":
    worker_main(scenarios)
