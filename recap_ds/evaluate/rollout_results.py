"""Episode records -> the ``rollouts`` of evaluation_results.json, a table for people, and LeRobot's eval_info.json.

N episodes of one entry
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_ds.evaluate.intervals import compare_paired, successes_per_hour, throughput_interval, wilson_interval
from recap_ds.evaluate.rollouts import Entry, PlayedRollouts, RolloutJob
from recap_ds.rollout.world import World

EVAL_INFO_NAME = "eval_info.json"


def summarise_rollouts(job: RolloutJob, played: PlayedRollouts) -> dict[str, Any]:
    spec, evaluation, records = job.spec, job.evaluation, played.records
    sights = [contestant.world for contestant in job.contestants for _ in contestant.entries]
    by_entry = [[r for r in records if r["entry"] == number] for number in range(len(job.entries))]
    return {
        "env": spec.name,
        "num_episodes": job.num_episodes,
        "seed": evaluation.rollout_seed,
        "fps": spec.fps,
        "max_steps": spec.max_steps,
        "executed_frames": evaluation.executed_frames or job.config.chunk_size,
        "wall_seconds": played.wall_seconds,
        "entries": [
            _entry(entry, sight, of_entry, by_entry[0] if number else None)
            for number, (entry, sight, of_entry) in enumerate(zip(job.entries, sights, by_entry, strict=True))
        ],
    }


def _entry(
    entry: Entry, sight: World, records: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """``sight``: the world as the entry's policy sees it."""
    fps = sight.spec.fps
    tasks = list(dict.fromkeys(record["task"] for record in records))
    figures = rollout_figures(records, fps)
    per_task = {task: rollout_figures([r for r in records if r["task"] == task], fps) for task in tasks}
    paired = None
    if reference is not None:
        this, other = (np.array([r["success"] for r in part]) for part in (records, reference))
        paired = compare_paired(this, other)._asdict()
    return {
        "checkpoint": entry.checkpoint,
        "indicator": entry.arm.indicator,
        "guidance_beta": entry.arm.guidance_beta,
        "image_size": sight.spec.image_size,
        "prompts": {task: known.prompt for task, known in sight.tasks.items()},
        **figures,
        "paired_with_first_entry": paired,
        "tasks": per_task,
        "episodes": [{key: value for key, value in r.items() if key != "entry"} for r in records],
    }


def rollout_figures(records: Sequence[dict[str, Any]], fps: float) -> dict[str, Any]:
    success = np.array([record["success"] for record in records], bool)
    frames = np.array([record["frames"] for record in records], np.float64)
    num_successes = int(success.sum())
    return {
        "num_episodes": len(records),
        "num_successes": num_successes,
        "success_rate": num_successes / len(records),
        "success_rate_interval": wilson_interval(num_successes, len(records)),
        "successes_per_hour": successes_per_hour(success, frames / fps),
        "successes_per_hour_interval": throughput_interval(success, frames / fps),
        "mean_frames": float(frames.mean()),
        "mean_frames_of_successes": float(frames[success].mean()) if num_successes else None,
    }


def rollout_table(rollouts: dict[str, Any]) -> str:
    """A few lines for people; the intervals are of 95 %."""
    lines = [f"{rollouts['env']}: {rollouts['num_episodes']} episodes from seed {rollouts['seed']}"]
    first = rollouts["entries"][0]
    for entry in rollouts["entries"]:
        told = f"{entry['indicator']} beta {entry['guidance_beta']:g}" if entry["indicator"] else "no indicator"
        where = "" if entry["checkpoint"] == first["checkpoint"] else f"  of {entry['checkpoint']}"
        lines.append(f"{told:<20} {_figures(entry)}{where}")
        paired = entry["paired_with_first_entry"]
        if paired is not None:
            lines.append(
                f"{'':<20} against the first line: {paired['only_this']} episodes won, {paired['only_reference']} lost,"
                f" p = {paired['p_value']:.3g}"
            )
        if len(entry["tasks"]) > 1:
            lines += [f"  {task:<18} {_figures(figures)}" for task, figures in entry["tasks"].items()]
    return "\n".join(lines)


def _figures(figures: dict[str, Any]) -> str:
    low, high = figures["success_rate_interval"]
    slow, fast = figures["successes_per_hour_interval"]
    return (
        f"success {figures['success_rate']:.2f} [{low:.2f}, {high:.2f}]  "
        f"{figures['successes_per_hour']:.0f} per hour [{slow:.0f}, {fast:.0f}]  "
        f"{figures['mean_frames']:.0f} frames"
    )


def eval_info(rollouts: dict[str, Any]) -> dict[str, Any]:
    """The first entry under the keys of ``lerobot-eval``, whose ``eval_s`` is the wall time: here of all entries."""
    group, entry = rollouts["env"], rollouts["entries"][0]
    episodes, tasks = entry["episodes"], list(entry["tasks"])
    per_task = []
    for number, task in enumerate(tasks):
        of_task = [episode for episode in episodes if episode["task"] == task]
        metrics = {
            "sum_rewards": [episode["sum_reward"] for episode in of_task],
            "max_rewards": [episode["max_reward"] for episode in of_task],
            "successes": [episode["success"] for episode in of_task],
            "video_paths": [episode["video"] for episode in of_task if episode["video"]],
        }
        per_task.append({"task_group": group, "task_id": number, "metrics": metrics})
    averages = {
        "avg_sum_reward": float(np.mean([episode["sum_reward"] for episode in episodes])),
        "avg_max_reward": float(np.mean([episode["max_reward"] for episode in episodes])),
        "pc_success": 100.0 * entry["success_rate"],
        "n_episodes": len(episodes),
    }
    num_played = sum(each["num_episodes"] for each in rollouts["entries"])
    times = {"eval_s": rollouts["wall_seconds"], "eval_ep_s": rollouts["wall_seconds"] / num_played}
    videos = [episode["video"] for episode in episodes if episode["video"]]
    return {
        "per_task": per_task,
        "per_group": {group: {**averages, "video_paths": videos}},
        "overall": {**averages, **times, "video_paths": videos},
    }


def write_eval_info(folder: Path, rollouts: dict[str, Any]) -> None:
    text = json.dumps(eval_info(rollouts), indent=1, allow_nan=False)
    (folder / EVAL_INFO_NAME).write_text(f"{text}\n", encoding="utf-8")
