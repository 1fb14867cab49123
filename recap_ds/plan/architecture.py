"""The VLM's architecture without its weights: from a folder, from what the hub client has cached, or as published.

Nothing is downloaded, not even a config.json.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from recap_ds.config import PiStarRECAPConfig, VlmSource
from recap_ds.errors import UsageError
from recap_ds.models.published import IMAGE_SIZES, published_config
from recap_ds.models.vlm_weights import locate_vlm


class Architecture(NamedTuple):
    folder: str | None  # holds config.json; None for the tiny VLM, which needs none
    source: str  # for the report


@contextmanager
def vlm_architecture(config: PiStarRECAPConfig) -> Iterator[Architecture]:
    """The folder may last only as long as the context."""
    source = config.vlm_source
    name = source.name
    if name == "tiny" or name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = locate_vlm(source)
        yield Architecture(folder and str(folder), "the tiny preset" if folder is None else f"{folder}/config.json")
        return
    cached = _cached_config(source)
    if cached is not None:
        yield Architecture(str(cached.parent), f"{name}, as cached from the hub")
        return
    # A critic's own VLM needs more of its folder than sizes.
    published = None if config.has_own_backbone else published_config(name)
    if published is None:
        raise UsageError(
            f"{source.key}: '{name}' is no folder, not in the hub's cache and not one of those whose sizes are "
            f"known here ({', '.join(IMAGE_SIZES)}); download its config.json and name the folder"
        )
    size = IMAGE_SIZES[name]
    if config.model.image_size != size:
        raise UsageError(f"model.image_size: {config.model.image_size}, but {name} sees {size} px; set it to that")
    with tempfile.TemporaryDirectory() as folder:
        published.save_pretrained(folder)
        yield Architecture(folder, f"{name}, numbers as published: its config.json is not on this machine")


def _cached_config(source: VlmSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(found) if isinstance(found, str) else None
