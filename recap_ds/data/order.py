"""The order of training samples: a pure function of (seed, slot).

    slot --lane--> its slot in the lane --Mixture--> (part, k) --Epochs--> sample id

Nothing before a slot has to be replayed: a start at any slot is O(1). With one lane (the default) there is one order.
With C of them, the positions of a global batch are divided into C runs of equal length, the shards of every part into C
groups of about as many samples, and each lane draws from its own: a node whose ranks hold whole lanes reads the shards
of these alone. The order depends on C, never on the number of ranks. A part of fewer shards than lanes is not divided:
all lanes draw from all of it, in turns.

Knows nothing of ranks, workers or files.

    P parts   n slots   C lanes
"""

from typing import NamedTuple

import numpy as np

from recap_ds.config import DataConfig
from recap_ds.data.draws import Purpose, generator, identity_of
from recap_ds.data.epochs import Epochs
from recap_ds.data.mixture import Mixture, Table
from recap_ds.data.parts import Part, draw_limits, part_weights
from recap_ds.errors import UsageError


class _Lane(NamedTuple):
    mixture: Mixture
    epochs: list[Epochs]  # [P]
    is_shared: list[bool]  # [P], True = all lanes draw from the same samples


class SampleOrder:
    """slot -> (part, sample id), for whole batches of slots."""

    def __init__(self, parts: list[Part], data: DataConfig, seed: int, slots_per_step: int):
        """UsageError where the tables of ``data`` do not fit the parts."""
        if not parts:
            raise UsageError("data.shards: no sample is left for training; lower data.held_out_fraction or add data")
        if slots_per_step % data.lanes:
            raise UsageError(
                f"data.lanes: {data.lanes} lanes do not divide the global batch of {slots_per_step}; change one of them"
            )
        self.parts = parts
        self._seed = seed
        self._num_lanes = data.lanes
        self._run = slots_per_step // data.lanes  # slots of a lane in one step
        groups = [_lane_groups(part, data.lanes) for part in parts]
        self._lanes = [self._lane(lane, groups, data) for lane in range(data.lanes)]

    def samples(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] part, [n] sample id) of [n] slots."""
        lanes, lane_slots = self._lane_slots(slots)
        parts = np.empty(len(slots), np.int64)
        ids = np.empty(len(slots), np.int64)
        for number in np.unique(lanes):
            lane, rows = self._lanes[number], np.flatnonzero(lanes == number)
            parts[rows], k = lane.mixture.draws(lane_slots[rows])
            for part in np.unique(parts[rows]):
                mine = parts[rows] == part
                turns = k[mine] * self._num_lanes + number if lane.is_shared[part] else k[mine]
                ids[rows[mine]] = lane.epochs[part].draw(turns)
        return parts, ids

    def epochs(self, slot: int) -> dict[str, float]:
        """Name of a source or part -> epochs of it in the slots before ``slot``."""
        steps, within = divmod(slot, self._run * self._num_lanes)
        drawn = np.zeros(len(self.parts), np.int64)
        for number, lane in enumerate(self._lanes):
            drawn += lane.mixture.drawn(steps * self._run + min(max(within - number * self._run, 0), self._run))
        sizes = np.array([part.samples.num_samples for part in self.parts])
        sources = [part.source for part in self.parts]
        taken = {}
        for source in dict.fromkeys(sources):
            mine = np.array([source == each for each in sources])
            taken[source] = drawn[mine].sum() / sizes[mine].sum()
        datasets = [number for number, part in enumerate(self.parts) if part.name != part.source]
        taken |= {self.parts[number].name: drawn[number] / sizes[number] for number in datasets}
        return {name: float(epochs) for name, epochs in taken.items()}

    def replacement(self, part: int, slot: int, attempt: int) -> int:
        """A sample of the same part and lane to stand in for a damaged one; another per ``attempt``."""
        lane = self._lanes[self._lane_slots(np.array([slot]))[0][0]]
        samples = lane.epochs[part].samples
        place = generator(self._seed, Purpose.REPLACEMENT, slot, attempt).integers(samples.num_samples)
        return samples.at(int(place))

    def _lane_slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] lane, [n] slot within it)."""
        steps, within = np.divmod(slots, self._run * self._num_lanes)
        lanes, position = np.divmod(within, self._run)
        return lanes, steps * self._run + position

    def _lane(self, number: int, groups: list[list[np.ndarray]], data: DataConfig) -> _Lane:
        epochs, is_shared, limits = [], [], []
        for part, group, limit in zip(self.parts, groups, draw_limits(data.max_epochs, self.parts), strict=True):
            divided = len(group) > 1
            stream = identity_of("lane", part.stream, number, self._num_lanes) if divided else part.stream
            samples = part.samples.only(group[number]) if divided else part.samples
            epochs.append(Epochs(stream, samples, self._seed, data.shuffle_shards))
            is_shared.append(not divided)
            limits.append(None if limit is None else self._limit_of_lane(number, part, samples.num_samples, limit))
        names = [part.name for part in self.parts]
        tables = [Table("data.mixture", 0, part_weights("data.mixture", data.mixture, self.parts))]
        for step, weights in sorted(data.mixture_schedule.items()):
            where = f"data.mixture_schedule.{step}"
            tables.append(Table(where, step * self._run, part_weights(where, weights, self.parts)))
        return _Lane(Mixture(names, tables, limits, self._seed, self._run, number), epochs, is_shared)

    def _limit_of_lane(self, number: int, part: Part, num_samples: int, limit: int) -> int:
        """Of the draws that the whole part may have: in turns where it is shared, else by what the lane holds."""
        if num_samples == part.samples.num_samples:
            return len(range(number, limit, self._num_lanes))
        return round(limit * num_samples / part.samples.num_samples)


def _lane_groups(part: Part, num_lanes: int) -> list[np.ndarray]:
    """Places of the part's shards by lane, about as many samples in each; one group where it is not divided."""
    sizes = part.samples.sizes
    if num_lanes == 1 or len(sizes) < num_lanes:
        return [np.arange(len(sizes))]
    filled = np.zeros(num_lanes, np.int64)
    lane = np.empty(len(sizes), np.int64)
    # The largest first, each to the lane with the fewest samples so far.
    for place in np.argsort(-sizes, kind="stable"):
        lane[place] = filled.argmin()
        filled[lane[place]] += sizes[place]
    return [np.flatnonzero(lane == number) for number in range(num_lanes)]
