"""The loader that a user of webdataset would write first: its own pipeline, with our decoding of a sample.

What it lacks beside ours: a mixture, an order that anything can be said of, resume, replacement of damaged samples; and
the masks, tokens and draws of a batch.
"""

import json
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from recap_ds.config import DataConfig
from recap_ds.data.sample import SampleArrays, SampleDecoder
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.workers import worker_options

SHUFFLED_SAMPLES = 1000


def plain_loader(
    shard_set: ShardSet, decoder: SampleDecoder, data: DataConfig, batch_size: int
) -> webdataset.WebLoader:
    """Endless batches of (images, camera mask, state, actions), by the same number of workers as ours."""
    urls = [str(shard_set.folder / entry.name) for entry in shard_set.manifest.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLED_SAMPLES).repeat()
    batches = samples.map(partial(_decode, decoder)).batched(batch_size, collation_fn=_collate)
    return webdataset.WebLoader(batches, batch_size=None, **worker_options(data))


def _decode(decoder: SampleDecoder, sample: dict[str, Any]) -> SampleArrays:
    members = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    return decoder.decode(members, json.loads(members["json"])["num_valid"], needs_next=False)


def _collate(rows: list[SampleArrays]) -> tuple[Tensor, ...]:
    views = [row.view for row in rows]
    columns = [[view.images for view in views], [view.camera_mask for view in views], [view.state for view in views]]
    return tuple(torch.from_numpy(np.stack(column)) for column in [*columns, [row.actions for row in rows]])
