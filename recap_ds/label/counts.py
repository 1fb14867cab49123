"""What labels came to, task by task.

N samples   K tasks
"""

from collections.abc import Sequence

from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.data.label_records import TaskLabels


def count_tasks(
    names: Sequence[str],
    task: Tensor,
    group: Tensor,
    advantage: Tensor,
    indicator: Tensor,
    forced: Tensor,
    sigma: Tensor,
) -> dict[str, TaskLabels]:
    """Of the final labels. All [N]; ``group``: who shares a threshold. ``sigma`` [K], inf where nothing was ranked."""
    known = ~forced & (indicator != INDICATOR_IDS["none"])
    positive = known & (indicator == INDICATOR_IDS["positive"])
    counts = {}
    for number, name in enumerate(names):
        mine = task == number
        num_samples, num_forced = int(mine.sum()), int((mine & forced).sum())
        num_known, num_positive = int((mine & known).sum()), int((mine & positive).sum())
        counts[name] = TaskLabels(
            num_samples=num_samples,
            num_forced=num_forced,
            num_known=num_known,
            num_positive=num_positive,
            forced_fraction=num_forced / max(num_samples, 1),
            positive_fraction=num_positive / num_known if num_known else None,
            threshold=_threshold(group, mine & known, advantage, known & ~positive),
            sigma=float(sigma[number]) if sigma[number].isfinite() else None,
        )
    return counts


def _threshold(group: Tensor, mine: Tensor, advantage: Tensor, negative: Tensor) -> float | None:
    """The highest negative advantage of the group that ``mine`` belong to, which may be other tasks'."""
    if not mine.any():
        return None
    below = advantage[negative & (group == group[mine][0])]
    return float(below.max()) if len(below) else None
