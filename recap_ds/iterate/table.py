"""What iterations came to in their environment, a line per iteration and way to act; intervals of 95 %."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recap_ds.errors import UsageError


def iterations_table(results: Sequence[Path]) -> str:
    """``results``: the evaluation results of iterations 1, 2, ..."""
    lines = []
    for number, path in enumerate(results, start=1):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["rollouts"]["entries"]
            lines += [f"iteration {number}  {_told(entry)}" for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); remove it, and run the same command again"
            ) from None
    return "\n".join(lines)


def _told(entry: dict[str, Any]) -> str:
    how = f"{entry['indicator']} beta {entry['guidance_beta']:g}" if entry["indicator"] else "no indicator"
    low, high = entry["success_rate_interval"]
    slow, fast = entry["successes_per_hour_interval"]
    return (
        f"{how:<20} success {entry['success_rate']:.2f} [{low:.2f}, {high:.2f}]  "
        f"{entry['successes_per_hour']:.0f} per hour [{slow:.0f}, {fast:.0f}]"
    )
