"""The parts of a mixture: a source, or one data set of a source, as data.mixture and its kin name them.

``demo`` is a source; ``demo/NAME`` those of its samples whose episodes are called ``NAME/<index>``. What is named
anywhere (mixture, schedule, caps) is a part of its own, the rest of each source another. A table of weights may name a
source alone: its weight then goes to all parts of it that the same table does not name, every sample equally often.

    P parts   E episodes
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from recap_ds.batch import OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import DataConfig
from recap_ds.data.draws import identity_of
from recap_ds.data.epochs import KeptSamples
from recap_ds.data.mixture import BLOCK_SLOTS
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError


class Part(NamedTuple):
    name: str  # as the tables spell it
    source: str
    samples: KeptSamples

    @property
    def stream(self) -> int:
        """Of its permutations: the same whatever other parts there are."""
        return SOURCE_IDS[self.source] if self.name == self.source else identity_of("part", self.name)


def training_parts(shard_set: ShardSet, data: DataConfig) -> list[Part]:
    """What training may draw, held-out episodes left out, by source and then name; parts without a sample are absent.

    UsageError for a data set that the shards do not hold.
    """
    kept = ~shard_set.held_out_episodes(data.held_out_fraction)
    succeeded = _succeeded(shard_set)
    named = {key: where for where, table in _tables(data) for key in table if "/" in key}
    dataset = _datasets(shard_set.episodes) if named else np.empty(0, np.str_)
    source_of_shard = np.array([SOURCE_IDS[entry.source] for entry in shard_set.manifest.shards])
    parts = []
    for source, number in SOURCE_IDS.items():
        shards = np.flatnonzero(source_of_shard == number)
        rest = kept & succeeded if source == "auto" and data.auto_episodes == "successful" else kept.copy()
        own = []
        for key in sorted(key for key in named if key.startswith(f"{source}/")):
            mine = dataset == key.partition("/")[2]
            samples = KeptSamples(shard_set.index, shards, rest & mine)
            if not samples.num_samples:
                raise UsageError(
                    f"{named[key]}.{key}: the shards hold no such sample to train on; data sets with {source} samples "
                    f"are {', '.join(_datasets_of(shard_set, shards)) or 'none'}"
                )
            own.append(Part(key, source, samples))
            rest &= ~mine
        whole = KeptSamples(shard_set.index, shards, rest)
        parts += [Part(source, source, whole)] * (whole.num_samples > 0) + own
    return parts


def _succeeded(shard_set: ShardSet) -> np.ndarray:
    """[E] bool."""
    succeeded = np.zeros(len(shard_set.episodes), bool)
    succeeded[shard_set.table.episode[shard_set.table.outcome == OUTCOME_IDS["success"]]] = True
    return succeeded


def _tables(data: DataConfig) -> list[tuple[str, Iterable[str]]]:
    """Every table that may name a part, with the key it stands under."""
    schedule = [(f"data.mixture_schedule.{step}", table) for step, table in data.mixture_schedule.items()]
    return [("data.mixture", data.mixture or {}), *schedule, ("data.max_epochs", data.max_epochs)]


def _datasets(episodes: Iterable[str]) -> np.ndarray:
    """[E] str: an episode is called "<data set>/<index>"."""
    return np.array([name.rpartition("/")[0] for name in episodes])


def _datasets_of(shard_set: ShardSet, shards: np.ndarray) -> list[str]:
    rows = [np.unique(shard_set.table.episode[slice(*shard_set.shard_starts[[j, j + 1]])]) for j in shards]
    return sorted({shard_set.episodes[i].rpartition("/")[0] for episodes in rows for i in episodes.tolist()})


def part_weights(where: str, table: Mapping[str, float] | None, parts: list[Part]) -> np.ndarray:
    """[P] float64 of one table; None makes every sample equally likely. ``where``: the key of the table."""
    sizes = np.array([part.samples.num_samples for part in parts], np.float64)
    if table is None:
        return at_least_a_slot(sizes)
    weights = np.zeros(len(parts))
    for key, weight in table.items():
        mine = np.array([part.name == key or (part.source == key and part.name not in table) for part in parts], bool)
        if weight > 0 and not mine.any():
            raise UsageError(f"{where}.{key}: the shards hold no {key} sample to train on; set it to 0 or add some")
        weights[mine] = weight * sizes[mine] / sizes[mine].sum()
    return weights


def at_least_a_slot(sizes: np.ndarray) -> np.ndarray:
    """[P] weights: the sizes, but where a part would have less than the one slot of a block that it can have, that."""
    small = np.zeros(len(sizes), bool)
    while True:
        share = sizes[~small].sum() / (BLOCK_SLOTS - small.sum())
        if not (now := small | (sizes < share)).any() or (now == small).all():
            return np.where(small, share, sizes)
        small = now


def draw_limits(max_epochs: Mapping[str, float], parts: list[Part]) -> list[int | None]:
    """Draws of each part at most; a part's own cap goes before its source's."""
    caps = [max_epochs.get(part.name, max_epochs.get(part.source)) for part in parts]
    return [
        None if cap is None else round(cap * part.samples.num_samples) for cap, part in zip(caps, parts, strict=True)
    ]
