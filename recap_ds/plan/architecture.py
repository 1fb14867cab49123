"""The VLM's architecture without its weights: from a folder, from what the hub client has cached, or as published.

Nothing is downloaded, not even a config.json.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from recap_ds.config import ModelConfig
from recap_ds.errors import UsageError
from recap_ds.models.published import IMAGE_SIZES, published_config
from recap_ds.models.vlm_weights import locate_vlm


class Architecture(NamedTuple):
    folder: str | None  # holds config.json; None for the tiny VLM, which needs none
    source: str  # for the report


@contextmanager
def vlm_architecture(model: ModelConfig) -> Iterator[Architecture]:
    """The folder may last only as long as the context."""
    name = model.vlm_model_name
    if name == "tiny" or name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = locate_vlm(model)
        yield Architecture(folder and str(folder), "the tiny preset" if folder is None else f"{folder}/config.json")
        return
    cached = _cached_config(model)
    if cached is not None:
        yield Architecture(str(cached.parent), f"{name}, as cached from the hub")
        return
    published = published_config(name)
    if published is None:
        raise UsageError(
            f"model.vlm_model_name: '{name}' is no folder, not in the hub's cache and not one of those whose sizes are "
            f"known here ({', '.join(IMAGE_SIZES)}); download its config.json and name the folder"
        )
    size = IMAGE_SIZES[name]
    if model.image_size != size:
        raise UsageError(f"model.image_size: {model.image_size}, but {name} sees {size} px; set it to that")
    with tempfile.TemporaryDirectory() as folder:
        published.save_pretrained(folder)
        yield Architecture(folder, f"{name}, numbers as published: its config.json is not on this machine")


def _cached_config(model: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.vlm_model_name, "config.json", revision=model.vlm_revision)
    return Path(found) if isinstance(found, str) else None
