"""Which tokenizer a policy reads prompts by: its export's own, else that of the VLM its settings name."""

from pathlib import Path

from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.export_format import TOKENIZER_NAME
from recap_ds.processing.tokens import Tokenizer, build_tokenizer


def load_tokenizer(export: Path | None, config: PiStarRECAPConfig) -> Tokenizer:
    """``export``: the folder of one, None where there is none; bytes for the tiny VLM."""
    own = None if export is None else export / TOKENIZER_NAME
    if own is not None and own.is_dir():
        return build_tokenizer(str(own), own_backbone=config.has_own_backbone)
    source = config.vlm_source
    return build_tokenizer(source.name, source.revision, config.has_own_backbone)
