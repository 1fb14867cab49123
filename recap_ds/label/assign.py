"""Pass 2 of a label job: stored values -> advantages -> who is positive. One process, no model, pure arithmetic.

Where an advantage looks n frames ahead, the value there is found by (episode, frame) over all shards: a shuffled data
set has an episode's frames anywhere. A sample whose advantage is not known (it could not be read, or nothing follows
it) is left without an indicator, unless it is forced positive.

    N samples   K tasks
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS, forced_positive
from recap_ds.algo.labels import (
    Lookahead,
    advantage_spread,
    lookahead_window,
    n_step_advantage,
    num_positive,
    sparse_time_reward,
    top_fraction,
)
from recap_ds.algo.returns import TaskScale, monte_carlo_return, takeovers_ahead, value_scale
from recap_ds.config import ValueConfig
from recap_ds.data.label_records import LabelRecord, LabelSettings
from recap_ds.data.labels import LabelColumns
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.values import StoredValues
from recap_ds.errors import UsageError
from recap_ds.label.counts import count_tasks


class _Samples(NamedTuple):
    """The index's numbers of every sample and what its task is measured in. All [N]."""

    task: Tensor
    source: Tensor
    outcome: Tensor
    control: Tensor
    episode: Tensor
    frame: Tensor
    steps_to_end: Tensor
    num_valid: Tensor
    failure_cost: Tensor  # frames
    takeover_cost: Tensor  # frames
    normaliser: Tensor  # frames


def assign_labels(
    shard_set: ShardSet, stored: StoredValues, values_tag: str, settings: LabelSettings
) -> tuple[LabelRecord, LabelColumns]:
    """Labels of every sample, and their record without files. UsageError where the data cannot bear the settings."""
    _check_source(settings, stored.record.value)
    samples = _gather(shard_set, stored)
    lookahead = settings.label.lookahead_frames(shard_set.manifest.fps)
    advantage = _advantages(shard_set, stored, samples, settings, lookahead)
    known = ~advantage.isnan()
    forced = forced_positive(samples.source, settings.demos, settings.label.corrections)
    ranked = known & ~forced
    tasks, shared = list(shard_set.manifest.tasks), settings.label.thresholds == "shared"
    group = torch.zeros_like(samples.task) if shared else samples.task
    names = ["all tasks together have"] if shared else [f"task '{name}' has" for name in tasks]
    _check_counts(names, group[ranked], settings.positive_fraction)
    key = torch.from_numpy(stored.key_rank)
    if settings.label.shuffle == "advantages":
        advantage = advantage[_dealing(samples.task, ranked, key)]
    positive = top_fraction(advantage, key, group, ranked, settings.positive_fraction)
    indicator = torch.where(ranked, INDICATOR_IDS["negative"], INDICATOR_IDS["none"])
    indicator = indicator.masked_fill(positive | forced, INDICATOR_IDS["positive"])
    sigma = advantage_spread(advantage, samples.task, ranked, len(tasks))
    if settings.label.shuffle == "labels":
        # With their advantages, of which a weighted policy learns; then no source says anything of a label.
        dealing = _dealing(samples.task, torch.ones_like(ranked), key)
        advantage, indicator, forced = advantage[dealing], indicator[dealing], torch.zeros_like(forced)
    columns = LabelColumns(
        stored.value, _returns(samples, stored.record.value), advantage.numpy(), indicator.numpy().astype(np.int64)
    )
    record = LabelRecord(
        values_tag=values_tag,
        values=stored.record,
        settings=settings,
        lookahead_frames=lookahead,
        tasks=count_tasks(tasks, samples.task, group, advantage, indicator, forced, sigma),
        files={},
    )
    return record, columns


def _dealing(task: Tensor, eligible: Tensor, key: Tensor) -> Tensor:
    """[N] the sample whose part each one gets: among the eligible of a task any, at random, else its own.

    The same whatever order the shards have, and in every run: a study's seeds share one dealing.
    """
    dealing = torch.arange(len(task))
    for number in task[eligible].unique().tolist():
        rows = torch.nonzero(eligible & (task == number))[:, 0]
        rows = rows[key[rows].argsort(stable=True)]
        dealing[rows] = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))]
    return dealing


def _check_source(settings: LabelSettings, value: ValueConfig) -> None:
    source = settings.label.source
    if (source == "distributional") != (value.critic == "distributional"):
        mend = "distributional" if value.critic == "distributional" else "iql or blend"
        raise UsageError(f"label.source: {source} does not fit values of a critic '{value.critic}'; set {mend}")
    if source == "blend" and value.reward == "environment":
        raise UsageError("label.source: blend counts frames, and the critic learned environment rewards; set iql")


def _gather(shard_set: ShardSet, stored: StoredValues) -> _Samples:
    table, record = shard_set.table, stored.record
    scale = _scale(shard_set, record.value, record.max_length)

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    task = column(table.task)
    return _Samples(
        task=task,
        source=column(table.source),
        outcome=column(table.outcome),
        control=column(table.control),
        episode=column(table.episode),
        frame=column(table.frame),
        steps_to_end=column(table.episode_length) - 1 - column(table.frame),
        num_valid=column(table.num_valid),
        failure_cost=scale.failure_cost[task],
        takeover_cost=record.value.takeover_penalty * scale.max_length[task],
        normaliser=scale.normaliser[task],
    )


def _scale(shard_set: ShardSet, value: ValueConfig, max_length: dict[str, int]) -> TaskScale:
    tasks = list(shard_set.manifest.tasks)
    # The recorded lengths hold the critic's overrides already.
    return value_scale(value.model_copy(update={"max_length": {}}), max_length, tasks)


def _returns(samples: _Samples, value: ValueConfig) -> np.ndarray:
    """[N] float32, NaN where the return is not known."""
    takeovers = takeovers_ahead(
        samples.episode, samples.frame, samples.num_valid, samples.steps_to_end, samples.control
    )
    returns, known = monte_carlo_return(
        samples.steps_to_end,
        samples.outcome,
        timeout_is=value.timeout_is,
        failure_cost=samples.failure_cost,
        normaliser=samples.normaliser,
        takeover_charge=takeovers * samples.takeover_cost,
    )
    return torch.where(known & (value.reward == "sparse_time"), returns, torch.nan).numpy()


def _advantages(
    shard_set: ShardSet, stored: StoredValues, samples: _Samples, settings: LabelSettings, lookahead: int | None
) -> Tensor:
    """[N] float32, NaN where it is not known."""
    label = settings.label
    if label.source == "distributional":
        return _n_step(shard_set, stored, samples, lookahead)
    assert stored.action_advantage is not None, "an IQL critic's values come with its advantages"
    action_advantage = torch.from_numpy(stored.action_advantage)
    if label.source == "iql":
        return action_advantage
    return label.blend * _n_step(shard_set, stored, samples, lookahead) + (1.0 - label.blend) * action_advantage


def _n_step(shard_set: ShardSet, stored: StoredValues, samples: _Samples, lookahead: int | None) -> Tensor:
    position, order = _sorted_positions(shard_set, samples)
    window = lookahead_window(
        samples.steps_to_end,
        samples.num_valid,
        samples.outcome,
        samples.control,
        lookahead=lookahead,
        timeout_is=stored.record.value.timeout_is,
        steps_to_last_value=_last_frame(samples) - samples.frame,
    )
    following = _find_following(shard_set, samples, window, position, order, lookahead)
    reward = sparse_time_reward(
        window,
        samples.outcome,
        failure_cost=samples.failure_cost,
        takeover_cost=samples.takeover_cost,
        normaliser=samples.normaliser,
    )
    value = torch.from_numpy(stored.value)
    advantage = n_step_advantage(reward, window.continues, value[following], value)
    return torch.where(window.valid, advantage, torch.nan)


def _sorted_positions(shard_set: ShardSet, samples: _Samples) -> tuple[Tensor, Tensor]:
    """One number per (episode, frame), ascending, [N], and the sample each belongs to, [N]."""
    position, order = _position(samples, samples.frame).sort()
    twice = torch.nonzero(position[1:] == position[:-1])[:, 0]
    if len(twice):
        raise UsageError(f"{shard_set.folder}: {_place(shard_set, samples, int(order[twice[0]]))} is there twice")
    return position, order


def _position(samples: _Samples, frame: Tensor) -> Tensor:
    width = int((samples.frame + samples.steps_to_end).max()) + 2
    return samples.episode * width + frame


def _last_frame(samples: _Samples) -> Tensor:
    """[N] the last frame of the sample's episode that is a sample itself (not every frame need be one)."""
    last = torch.zeros(int(samples.episode.max()) + 1, dtype=torch.int64)
    last.scatter_reduce_(0, samples.episode, samples.frame, "amax")
    return last[samples.episode]


def _find_following(
    shard_set: ShardSet,
    samples: _Samples,
    window: Lookahead,
    position: Tensor,
    order: Tensor,
    lookahead: int | None,
) -> Tensor:
    """[N] the sample at frame t + n; any where none is needed. UsageError where one that is needed is missing."""
    wanted = _position(samples, samples.frame + window.steps)
    found = torch.searchsorted(position, wanted).clamp(max=len(position) - 1)
    missing = torch.nonzero(window.valid & window.continues & (position[found] != wanted))[:, 0]
    if len(missing):
        raise _missing_frame(shard_set, samples, window, int(missing[0]), lookahead)
    return order[found]


def _missing_frame(
    shard_set: ShardSet, samples: _Samples, window: Lookahead, sample: int, lookahead: int | None
) -> UsageError:
    episode = samples.episode == samples.episode[sample]
    # Of one run under one control; a frame that is missing makes a gap larger, never smaller.
    end = samples.frame + samples.num_valid
    frames = samples.frame[episode & (end == end[sample])].sort().values
    stride = int(frames.diff().min()) if len(frames) > 1 else 1
    if lookahead is not None and lookahead % stride and int(window.steps[sample]) == lookahead:
        near = [frames for frames in (lookahead // stride * stride, -(-lookahead // stride) * stride) if frames]
        return UsageError(
            f"label.lookahead: {lookahead} frames is no multiple of the stride of {stride} frames at which episode "
            f"{shard_set.episodes[int(samples.episode[sample])]} was sampled; set {' or '.join(map(str, near))}"
        )
    frame = int(samples.frame[sample] + window.steps[sample])
    return UsageError(
        f"{shard_set.folder}: episode {shard_set.episodes[int(samples.episode[sample])]} lacks frame {frame}, which "
        f"the advantage of its frame {int(samples.frame[sample])} looks ahead to; add the shard that holds it, or set "
        "another label.lookahead"
    )


def _place(shard_set: ShardSet, samples: _Samples, sample: int) -> str:
    return f"frame {int(samples.frame[sample])} of episode {shard_set.episodes[int(samples.episode[sample])]}"


def _check_counts(names: Sequence[str], ranked_group: Tensor, fraction: float) -> None:
    """``names``: the groups that have a threshold each, as a sentence begins with them."""
    for group, name in enumerate(names):
        total = int((ranked_group == group).sum())
        num = num_positive(total, fraction)
        if total and not 0 < num < total:
            raise UsageError(
                f"recap.positive_fraction: {name} too few samples for {fraction:g}: of the {total} that are "
                f"not forced positive, {num} would be; collect more, or set another fraction"
            )
