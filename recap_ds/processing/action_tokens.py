"""Action chunks to token ids, for a VLM that learns to predict them (knowledge insulation, arXiv 2505.23705).

binned: one token per value, n bins over [-1, 1], frame by frame, within a frame dim by dim. Of a chunk of H frames of D
dims every s-th frame is written, s the smallest stride with which a whole chunk fits ``max_action_tokens``.
FAST (arXiv 2501.09747): a cosine transform over time, rounded, lowest frequencies first, each coefficient a character,
merged by byte-pair encoding. Read from a FAST tokenizer's files; the code that lies beside them is never run.

Actions are normalised. Frames past a chunk's end and dims that the robot lacks have no token.

    N chunks   k real frames of a chunk   D dims of the robot   M places for tokens
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from recap_ds.config import ModelConfig
from recap_ds.errors import UsageError

BINNED = "binned"
KEY = "model.action_tokenizer"
TOKENIZER_NAME, SETTINGS_NAME = "tokenizer.json", "processor_config.json"
LAST_CHARACTER = 0xD7FF  # beyond it lie surrogates, which are no characters


class ActionTokenizer(Protocol):
    vocab_size: int

    def encode(self, actions: np.ndarray) -> list[int]:
        """Ids of ``actions`` [k, D], in [0, vocab_size)."""
        ...


class BinnedActions:
    def __init__(self, vocab_size: int, stride: int):
        self.vocab_size, self.stride = vocab_size, stride

    def encode(self, actions: np.ndarray) -> list[int]:
        bins = np.floor((np.clip(actions[:: self.stride], -1.0, 1.0) + 1.0) * (self.vocab_size / 2))
        return np.minimum(bins, self.vocab_size - 1).astype(np.int64).flatten().tolist()

    def decode(self, tokens: Sequence[int], num_dims: int) -> np.ndarray:
        """The middles of the bins, [frames written, D]."""
        return ((np.array(tokens) + 0.5) * (2 / self.vocab_size) - 1.0).reshape(-1, num_dims)


class FastActions:
    """Of ``folder``'s two files. UsageError where they are not those of a FAST tokenizer."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        try:
            settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
            self._scale, self._min_token = float(settings["scale"]), int(settings["min_token"])
            self.vocab_size = int(settings["vocab_size"])
            words = (folder / TOKENIZER_NAME).read_text(encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{KEY}: {folder} does not hold a FAST tokenizer ({error!r})") from None
        try:
            self._merges = Tokenizer.from_str(words)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{KEY}: {folder / TOKENIZER_NAME} is no tokenizer ({error})") from None
        if self._merges.get_vocab_size() > self.vocab_size:
            raise UsageError(
                f"{KEY}: {folder / TOKENIZER_NAME} has {self._merges.get_vocab_size()} tokens, but its "
                f"{SETTINGS_NAME} tells of {self.vocab_size}; copy it again"
            )

    def encode(self, actions: np.ndarray) -> list[int]:
        coefficients = np.around(cosine_matrix(len(actions)) @ actions.astype(np.float64) * self._scale)
        characters = np.clip(coefficients.flatten() - self._min_token, 0, LAST_CHARACTER).astype(np.int64)
        return self._merges.encode("".join(map(chr, characters))).ids


def cosine_matrix(num_frames: int) -> np.ndarray:
    """[k, k]: the orthonormal DCT-II, lowest frequency first."""
    frequency, frame = np.arange(num_frames)[:, None], np.arange(num_frames)
    matrix = np.cos(np.pi * frequency * (2 * frame + 1) / (2 * max(num_frames, 1))) * np.sqrt(2 / max(num_frames, 1))
    matrix[:1] /= np.sqrt(2)
    return matrix


def build_action_tokenizer(model: ModelConfig, chunk_size: int, num_dims: int) -> ActionTokenizer:
    """For chunks [``chunk_size``, ``num_dims``]. UsageError where the settings do not go together."""
    if model.action_tokenizer == BINNED:
        if num_dims > model.max_action_tokens:
            raise UsageError(
                f"model.max_action_tokens: {model.max_action_tokens} is too few for the {num_dims} values of a frame; "
                f"raise it to at least {num_dims}"
            )
        num_frames = min(model.max_action_tokens // num_dims, chunk_size)
        return BinnedActions(model.action_vocabulary, stride=-(-chunk_size // num_frames))
    tokenizer = FastActions(_locate(model.action_tokenizer))
    if tokenizer.vocab_size != model.action_vocabulary:
        raise UsageError(
            f"model.action_vocabulary: {model.action_vocabulary}, but '{model.action_tokenizer}' has "
            f"{tokenizer.vocab_size} tokens; set it to that"
        )
    return tokenizer


def encode_chunks(
    tokenizer: ActionTokenizer | None, chunks: Sequence[np.ndarray], max_action_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [N, M] int64, mask [N, M] bool, True = a real token) of ``chunks`` [k, D]; M is 0 without a tokenizer.

    What does not fit is left out: of FAST, whose last tokens are the highest frequencies.
    """
    ids = np.zeros((len(chunks), max_action_tokens), np.int64)
    mask = np.zeros((len(chunks), max_action_tokens), bool)
    if tokenizer is not None:
        for row, chunk in enumerate(chunks):
            tokens = tokenizer.encode(chunk)[:max_action_tokens]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
    return ids, mask


def _locate(name: str) -> Path:
    """A folder as it is; of a hub id, what the cache holds: nothing is fetched in the middle of a start."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        files = [Path(hf_hub_download(name, file, local_files_only=True)) for file in (TOKENIZER_NAME, SETTINGS_NAME)]
    except (LocalEntryNotFoundError, HFValidationError):
        raise UsageError(
            f"{KEY}: '{name}' is neither a folder nor in the hub's cache; run 'hf download {name}', or set {BINNED}"
        ) from None
    return files[0].parent
