"""What the language model is told: the task alone, or as pi0.5 has it, with the robot's state in words.

    plain   <bos> text <newline>, as PaliGemma and pi0 read it
    pi05    <bos> "Task: text, State: 128 3 255;\\nAction: ", underscores of the text read as spaces

A state dim is the number of its bin, of 256 over [-1, 1], so states are normalised by quantiles (arXiv 2504.16054;
openpi). Above 1 is the last bin; below -1 is -1, as there. Only the dims that the robot has are written.

    N prompts   L max_prompt_tokens   S state dims as the model has them
"""

from collections.abc import Sequence

import numpy as np

from recap_ds.config import PiStarRECAPConfig
from recap_ds.processing.tokens import Tokenizer, clean_prompt, encode_prompts, pad_tokens

NUM_BINS = 256
BIN_STARTS = np.linspace(-1.0, 1.0, NUM_BINS + 1)[:-1]
# The numbers of a bin that may take most tokens, whatever the tokenizer makes of digits.
LONG_NUMBERS = (-1, 128, NUM_BINS - 1)


def state_bins(states: np.ndarray) -> np.ndarray:
    """Normalised states -> numbers of bins, int64 of the same shape, from -1 to 255."""
    return np.digitize(states, BIN_STARTS) - 1


def pi05_prompt(prompt: str, bins: Sequence[int]) -> str:
    text = clean_prompt(prompt.replace("_", " "))
    return f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: "


class PromptEncoder:
    """For one run or policy and the robot it is for."""

    def __init__(self, config: PiStarRECAPConfig, tokenizer: Tokenizer, state_dim: int) -> None:
        self.reads_state = config.data.prompt_format == "pi05"
        self._tokenizer, self._state_dim = tokenizer, state_dim
        self._max_tokens = config.model.max_prompt_tokens

    def encode(self, prompts: Sequence[str], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids [N, L] int64, mask [N, L] bool, True = a real token) for ``states`` [N, S].

        UsageError where a prompt does not fit.
        """
        if not self.reads_state:
            return encode_prompts(self._tokenizer, prompts, self._max_tokens)
        bins = state_bins(states[:, : self._state_dim]).tolist()
        texts = [pi05_prompt(prompt, row) for prompt, row in zip(prompts, bins, strict=True)]
        rows = [self._tokenizer.encode_text(text) for text in texts]
        return pad_tokens(self._tokenizer, texts, rows, self._max_tokens)

    def check(self, prompts: Sequence[str]) -> None:
        """UsageError where a prompt might not fit with some state: said before training, not in the middle of it."""
        for number in LONG_NUMBERS if self.reads_state else (0,):
            value = -2.0 if number < 0 else BIN_STARTS[number]
            self.encode(prompts, np.full((len(prompts), self._state_dim), value))
