"""Run folders and results as training and evaluation leave them, made by hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recap_ds.config import PiStarRECAPConfig
from recap_ds.recipe import build_config, dump_config

NOW = 1_800_000_000.0
TASKS = ("lift", "push")


def made_config(**sections: Any) -> PiStarRECAPConfig:
    return build_config(
        {
            "name": "made",
            "model": {"vlm_model_name": "tiny", "image_size": 64},
            "training": {"num_training_steps": 1000, "num_warmup_steps": 100, **sections.pop("training", {})},
            "logging": {"every_steps": 10},
            **sections,
        }
    )


def write_run(
    path: Path,
    config: PiStarRECAPConfig | None = None,
    *,
    num_steps: int = 1000,
    loss: Callable[[int], float | None] = lambda step: 2.0 / (1.0 + step / 100),
    held_out: Callable[[int], dict[str, float]] = lambda step: {"eval/loss": 2.2 / (1.0 + step / 100)},
    finished: bool = True,
    age_seconds: float = 10.0,
    **metrics: float,
) -> Path:
    """``metrics``: constants of every training line, by name with __ for a slash."""
    path.mkdir(parents=True)
    config = config or made_config()
    (path / "config.yaml").write_text(dump_config(config))
    os.utime(path / "config.yaml", (NOW - 1e6, NOW - 1e6))
    facts = {
        "global_batch": 32,
        "manifest_hash": "a" * 64,
        "labels_hash": None,
        "python": "3.11",
        "versions": {"t": "1"},
    }
    (path / "run.json").write_text(json.dumps(facts))
    (path / "contract.json").write_text(json.dumps({"tasks": {task: {} for task in TASKS}}))
    constants = {name.replace("__", "/"): value for name, value in metrics.items()}
    lines = []
    for step in range(10, num_steps + 1, 10):
        lines.append({"step": step, "train/loss": loss(step), **constants})
        if step % 200 == 0:
            lines.append({"step": step, **held_out(step)})
    write_metrics(path, "".join(f"{json.dumps(line)}\n" for line in lines), age_seconds)
    if finished:
        (path / "summary.json").write_text(json.dumps({"step": num_steps, "stopped_early": False}))
    return path


def write_metrics(path: Path, text: str, age_seconds: float = 10.0) -> None:
    (path / "metrics.jsonl").write_text(text)
    os.utime(path / "metrics.jsonl", (NOW - age_seconds, NOW - age_seconds))


def write_failure(path: Path, when: str, why: str, rank: int = 0) -> None:
    (path / "failures").mkdir(exist_ok=True)
    with (path / "failures" / f"rank_{rank}.txt").open("a") as file:
        file.write(f"\n=== {when} UTC: {why}\nTraceback ...\n")


def made_rate(num_successes: int, num_episodes: int) -> dict[str, Any]:
    rate = num_successes / num_episodes
    return {
        "num_episodes": num_episodes,
        "num_successes": num_successes,
        "success_rate": rate,
        "success_rate_interval": [max(rate - 0.2, 0.0), min(rate + 0.2, 1.0)],
        "successes_per_hour": 100 * rate,
        "successes_per_hour_interval": [50 * rate, 150 * rate],
        "mean_frames": 40.0,
        "mean_frames_of_successes": None,
    }


def made_entry(num_successes: int, paired: tuple[int, int, float] | None = None, **changes: Any) -> dict[str, Any]:
    won_lost = None
    if paired is not None:
        won_lost = {"both": 1, "only_this": paired[0], "only_reference": paired[1], "neither": 0, "p_value": paired[2]}
    return {
        "checkpoint": "exports/made",
        "indicator": "positive",
        "guidance_beta": 1.0,
        **made_rate(num_successes, 20),
        "paired_with_first_entry": won_lost,
        "tasks": {task: made_rate(num_successes // 2, 10) for task in TASKS},
        "episodes": [],
        **changes,
    }


def made_results(*entries: dict[str, Any]) -> dict[str, Any]:
    rollouts = {"env": "reach", "num_episodes": 20, "seed": 1000, "entries": list(entries)}
    return {"checkpoint": "exports/made", "dataset_path": None, "dataset_evaluation": None, "rollouts": rollouts}
