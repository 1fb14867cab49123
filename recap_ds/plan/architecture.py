"""The VLM's architecture without its weights: from a folder, from what the hub client has cached, or as published.

Of a run that begins with other weights (``training.start_from``) it is theirs: an export's where it is on this machine;
where it is not, beside a joint expert, that of pi0 and pi0.5.

Nothing is downloaded, not even a config.json.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from recap_ds.config import PiStarRECAPConfig, VlmSource
from recap_ds.errors import UsageError
from recap_ds.models.export_format import VLM_CONFIG_NAME, VLM_NAME
from recap_ds.models.published import IMAGE_SIZES, NUM_WORDS, NUM_WORDS_PADDED, published_config
from recap_ds.models.vlm_weights import locate_vlm


class Architecture(NamedTuple):
    folder: str | None  # holds config.json; None for the tiny VLM, which needs none
    source: str  # for the report


@contextmanager
def vlm_architecture(config: PiStarRECAPConfig) -> Iterator[Architecture]:
    """The folder may last only as long as the context."""
    source, start = config.vlm_source, config.training.start_from
    name = source.name
    if start is not None and not config.has_own_backbone:
        inside = Path(start).expanduser() / VLM_NAME
        if (inside / VLM_CONFIG_NAME).is_file():
            yield Architecture(str(inside), f"{inside}/{VLM_CONFIG_NAME}")
            return
    if name == "tiny" or name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = locate_vlm(source)
        yield Architecture(folder and str(folder), "the tiny preset" if folder is None else f"{folder}/config.json")
        return
    is_pi = start is not None and config.model.action_expert == "pi_joint"
    cached = None if is_pi else _cached_config(source)
    if cached is not None:
        yield Architecture(str(cached.parent), f"{name}, as cached from the hub")
        return
    # A critic's own VLM needs more of its folder than sizes.
    num_words = NUM_WORDS if is_pi else NUM_WORDS_PADDED
    published = None if config.has_own_backbone else published_config(name, num_words)
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
        what, missing = (f"{name} in {config.model.pi_version}", start) if is_pi else (name, "its config.json")
        yield Architecture(folder, f"{what}, numbers as published: {missing} is not on this machine")


def _cached_config(source: VlmSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(found) if isinstance(found, str) else None
