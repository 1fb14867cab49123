"""An index of samples that no tar holds: for the order, which reads nothing but shards and episodes."""

import numpy as np

from recap_ds.config import DataConfig
from recap_ds.data.epochs import KeptSamples
from recap_ds.data.order import SampleOrder
from recap_ds.data.parts import Part
from recap_ds.data.sample_table import Names, SetIndex, table_layouts


def made_index(shard_sizes: list[int]) -> SetIndex:
    """Every sample an episode of its own."""
    num_samples = sum(shard_sizes)
    text, ends = Names.pack([])
    arrays = {name: np.zeros(layout.shape, layout.dtype) for name, layout in table_layouts(num_samples, 1).items()}
    arrays |= {"episode_text": text, "episode_ends": ends, "shard_starts": np.cumsum([0, *shard_sizes])}
    arrays["episode"] = np.arange(num_samples, dtype=np.int32)
    return SetIndex(("json",), arrays)


def made_parts(sizes: dict[str, list[int]], held_out: bool = True) -> list[Part]:
    """Parts by name, of so many kept samples per shard; ``held_out``: as many again, every other one, are left out."""
    each = 2 if held_out else 1
    index = made_index([each * size for shards in sizes.values() for size in shards])
    kept = np.arange(len(index.table.episode)) % each == 0
    parts, first = [], 0
    for name, shards in sizes.items():
        samples = KeptSamples(index, np.arange(first, first + len(shards)), kept)
        parts.append(Part(name, name.partition("/")[0], samples))
        first += len(shards)
    return parts


def made_order(sizes: dict[str, list[int]], seed: int = 0, slots_per_step: int = 8, **data) -> SampleOrder:
    return SampleOrder(made_parts(sizes), DataConfig(**data), seed, slots_per_step)


def ids_of(part: Part) -> np.ndarray:
    return np.concatenate([part.samples.of_shard(place) for place in range(len(part.samples.sizes))])
