"""The advantage in words (RECAP, arXiv 2511.14759): "Advantage: negative" and "Advantage: positive" behind the prefix.

Each is a block of tokens of its own, which sees the prefix and itself; a draw of the action expert attends to the block
of its indicator, to none where it has none. Both are encoded with the prefix, whoever will read them: losses, measures
and guidance share one encoding of an observation, and the prefix, which critics read, knows of neither.

    E words of all blocks together   B batch   F flow draws
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.building import Builder
from recap_ds.models.export_tokenizer import load_tokenizer

ADVANTAGES = ("negative", "positive")
# Of each advantage, where there are no weights and so no tokenizer is asked for: about what PaliGemma's makes of it.
NUM_ASSUMED_TOKENS = 4


class AdvantageWords(NamedTuple):
    tokens: Tensor  # [E] int64
    readers: Tensor  # [E] int64, INDICATOR_IDS: the draws that attend to it

    def same_block(self) -> Tensor:
        """[E, E] bool, True = of one block."""
        return self.readers[:, None] == self.readers

    def order(self) -> Tensor:
        """[E] int64, place within the block."""
        return self.same_block().tril().sum(dim=1) - 1


def read_by(readers: Tensor, indicator: Tensor) -> Tensor:
    """[B, F, E] bool, True = the draw of ``indicator`` [B, F] attends to the word."""
    return indicator[..., None] == readers


def advantage_words(config: PiStarRECAPConfig, builder: Builder, vlm_folder: str | None) -> AdvantageWords:
    """By the tokenizer that the prompts are read by: that beside ``vlm_folder``, or of the settings."""
    if builder.holds_values or config.vlm_source.name == "tiny":
        tokenizer = load_tokenizer(Path(vlm_folder).parent if vlm_folder else None, config)
        rows = [tokenizer.encode_text(f"Advantage: {name}")[1:] for name in ADVANTAGES]  # <bos> began the prompt
    else:
        rows = [[0] * NUM_ASSUMED_TOKENS] * len(ADVANTAGES)
    readers = [INDICATOR_IDS[name] for name, row in zip(ADVANTAGES, rows, strict=True) for _ in row]
    return AdvantageWords(torch.tensor([token for row in rows for token in row]), torch.tensor(readers))
