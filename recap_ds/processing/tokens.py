"""Prompts to token ids, as PaliGemma reads them: <bos> text <newline>, padded on the right to a fixed length.

Tokenizers behind one protocol: bytes for the tiny preset (no download), Hugging Face's for everything else; a critic's
own backbone takes its tokenizer as it comes.
A prompt is never cut: one that does not fit is an error, at start, because a policy trained on half of its prompt looks
like any other. Depends on nothing but errors, so that models and servers can use it as well as the loader.

    N prompts   L max_prompt_tokens
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from recap_ds.errors import UsageError

# The same ids as Gemma's.
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2


class Tokenizer(Protocol):
    vocab_size: int
    pad_id: int

    def encode(self, prompt: str) -> list[int]:
        """Ids of <bos> text <newline>: neither cut nor padded."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of <bos> and ``text`` as it stands."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, shifted past the three special ids."""

    pad_id = PAD_ID
    first_byte_id = 3
    vocab_size = first_byte_id + 256

    def encode(self, prompt: str) -> list[int]:
        return self.encode_text(f"{clean_prompt(prompt)}\n")

    def encode_text(self, text: str) -> list[int]:
        return [BOS_ID, *(byte + self.first_byte_id for byte in text.encode())]


class OwnTokenizer:
    """A tokenizer from a folder or a hub id, through transformers, with whatever it puts around a text by itself.

    For a critic's own backbone (``value.backbone``), which was trained on no form of prompt that is known here.
    """

    key = "value.vlm_model_name"

    def __init__(self, name: str, revision: str | None = None):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"{self.key}: no tokenizer can be loaded from '{name}' ({reason}); give a local folder "
                f"with one, or log in with 'hf auth login' where the model is gated"
            ) from None
        self.vocab_size = len(self._tokenizer)
        given = self._tokenizer.pad_token_id
        # Padding is masked out wherever it stands; any id of the table will do.
        self.pad_id = PAD_ID if given is None else given

    def encode(self, prompt: str) -> list[int]:
        return self.encode_text(clean_prompt(prompt))

    def encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class HuggingFaceTokenizer(OwnTokenizer):
    """PaliGemma's, and any other with a <bos> token, made to write prompts as PaliGemma reads them."""

    key = "model.vlm_model_name"

    def __init__(self, name: str, revision: str | None = None):
        super().__init__(name, revision)
        if self._tokenizer.bos_token_id is None:
            raise UsageError(f"{self.key}: the tokenizer of '{name}' has no <bos> token; it is not PaliGemma's")

    def encode(self, prompt: str) -> list[int]:
        # The newline apart from the text: SentencePiece could otherwise merge it into the last piece.
        pieces = [self._tokenizer.encode(text, add_special_tokens=False) for text in (clean_prompt(prompt), "\n")]
        return [self._tokenizer.bos_token_id, *pieces[0], *pieces[1]]

    def encode_text(self, text: str) -> list[int]:
        return [self._tokenizer.bos_token_id, *self._tokenizer.encode(text, add_special_tokens=False)]


def build_tokenizer(vlm_model_name: str, revision: str | None = None, own_backbone: bool = False) -> Tokenizer:
    if own_backbone:
        return OwnTokenizer(vlm_model_name, revision)
    return ByteTokenizer() if vlm_model_name == "tiny" else HuggingFaceTokenizer(vlm_model_name, revision)


def clean_prompt(prompt: str) -> str:
    """One line without space around it: a newline inside would end the prompt early for the model."""
    return " ".join(prompt.split())


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], max_prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [N, L] int64, mask [N, L] bool, True = a real token). UsageError where a prompt does not fit."""
    return pad_tokens(tokenizer, prompts, [tokenizer.encode(prompt) for prompt in prompts], max_prompt_tokens)


def pad_tokens(
    tokenizer: Tokenizer, prompts: Sequence[str], rows: Sequence[Sequence[int]], max_prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Like ``encode_prompts``, of ``rows`` of ids that ``prompts`` have become."""
    ids = np.full((len(rows), max_prompt_tokens), tokenizer.pad_id, np.int64)
    mask = np.zeros((len(rows), max_prompt_tokens), bool)
    for number, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        if len(tokens) > max_prompt_tokens:
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise UsageError(
                f"model.max_prompt_tokens: {max_prompt_tokens} is too few for the {len(tokens)} tokens of {shown!r}; "
                f"raise it to at least {len(tokens)}"
            )
        ids[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = True
    return ids, mask
