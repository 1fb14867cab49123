"""Tokens of action chunks by hand, back again, and from files in the form of the public FAST tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from recap_ds.config import ModelConfig
from recap_ds.errors import UsageError
from recap_ds.processing.action_tokens import (
    BinnedActions,
    FastActions,
    build_action_tokenizer,
    cosine_matrix,
    encode_chunks,
)

MIN_TOKEN = -40
SETTINGS = {"scale": 10, "min_token": MIN_TOKEN, "vocab_size": 90, "processor_class": "UniversalActionProcessor"}


@pytest.fixture
def fast_folder(tmp_path):
    """A character per coefficient of [-40, 40], and one merge: two zeros are one token, 81."""
    characters = [chr(code) for code in range(81)]
    zero = chr(-MIN_TOKEN)
    words = {word: number for number, word in enumerate([*characters, zero + zero])}
    (tmp_path / "tokenizer.json").write_text(Tokenizer(BPE(words, [(zero, zero)])).to_str(), encoding="utf-8")
    (tmp_path / "processor_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    return tmp_path


def model_of(**values) -> ModelConfig:
    return ModelConfig(action_expert="pi_joint", **values)


def test_bins_by_hand():
    tokenizer = build_action_tokenizer(model_of(action_vocabulary=4, max_action_tokens=6), 3, 2)
    assert tokenizer.encode(np.array([[-1.0, 1.0], [-0.51, -0.49], [7.0, -7.0]])) == [0, 3, 0, 1, 3, 0]
    np.testing.assert_allclose(tokenizer.decode([0, 3, 1, 2], 2), [[-0.75, 0.75], [-0.25, 0.25]])
    assert tokenizer.encode(np.zeros((0, 2))) == []


def test_a_round_trip_is_within_half_a_bin():
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7)).astype(np.float32)
    tokenizer = build_action_tokenizer(model_of(max_action_tokens=350), 50, 7)
    assert np.abs(tokenizer.decode(tokenizer.encode(actions), 7) - actions).max() <= 1 / 256 + 1e-6


@pytest.mark.parametrize(("places", "frames"), [(350, range(50)), (349, range(0, 50, 2)), (128, range(0, 50, 3))])
def test_frames_are_left_out_evenly_and_no_more_than_needed(places, frames):
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7))
    tokenizer = build_action_tokenizer(model_of(max_action_tokens=places), 50, 7)
    assert tokenizer.encode(actions) == BinnedActions(256, 1).encode(actions[list(frames)])
    assert len(frames) * 7 <= places
    # A chunk that ends early keeps the stride: a token means the same moment in all of them.
    assert tokenizer.encode(actions[:5]) == BinnedActions(256, 1).encode(actions[[f for f in frames if f < 5]])


def test_the_cosine_transform_is_orthonormal_and_its_first_row_the_mean():
    matrix = cosine_matrix(5)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(matrix[0], 5**-0.5)
    np.testing.assert_allclose(matrix[1], np.sqrt(0.4) * np.cos(np.pi * np.array([1, 3, 5, 7, 9]) / 10))


def test_fast_by_hand(fast_folder):
    tokenizer = build_action_tokenizer(model_of(action_tokenizer=str(fast_folder), action_vocabulary=90), 4, 2)
    # Constant over four frames: the lowest frequency is twice the value, times 10; six zeros are three merged pairs.
    assert tokenizer.encode(np.tile([[0.5, -0.3]], (4, 1))) == [10 + 40, -6 + 40, 81, 81, 81]
    # Beyond the characters that there are, at the last of them that is no surrogate: no error, and the token is none.
    assert tokenizer.encode(np.full((1, 1), 1e9)) == []
    assert tokenizer.encode(np.full((1, 1), -1e9)) == [0]
    assert tokenizer.encode(np.zeros((0, 2))) == []


def test_fast_comes_back_within_its_rounding(fast_folder):
    actions = np.random.default_rng(0).uniform(-0.8, 0.8, (6, 3))
    tokenizer = FastActions(fast_folder)
    words = Tokenizer.from_file(str(fast_folder / "tokenizer.json"))
    characters = "".join(words.id_to_token(token) for token in tokenizer.encode(actions))
    coefficients = (np.array(list(map(ord, characters))) + MIN_TOKEN).reshape(6, 3) / 10
    assert np.abs(cosine_matrix(6).T @ coefficients - actions).max() < 0.05 * np.sqrt(6)


def test_chunks_fill_their_places_from_the_left_and_are_cut_at_the_end():
    ids, mask = encode_chunks(BinnedActions(4, 1), [np.full((n, 1), 0.6) for n in (0, 2, 5)], 3)
    np.testing.assert_array_equal(ids, [[0, 0, 0], [3, 3, 0], [3, 3, 3]])
    np.testing.assert_array_equal(mask, [[False] * 3, [True, True, False], [True] * 3])
    assert encode_chunks(None, [np.zeros((2, 1))], 0)[0].shape == (1, 0)


def test_what_cannot_be_loaded_is_told_in_one_line(fast_folder, monkeypatch):
    def refusal(**values) -> str:
        with pytest.raises(UsageError) as caught:
            build_action_tokenizer(model_of(**values), 10, 7)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = str(fast_folder)
    assert "model.max_action_tokens: 6 is too few for the 7 values of a frame" in refusal(max_action_tokens=6)
    assert "model.action_vocabulary: 256, but" in refusal(action_tokenizer=folder)
    for name in ("nobody/has-this", "/no/such/folder", "a b"):
        assert f"'{name}' is neither a folder nor in the hub's cache" in refusal(action_tokenizer=name)
    settings, words = fast_folder / "processor_config.json", fast_folder / "tokenizer.json"
    settings.write_text(json.dumps(SETTINGS | {"vocab_size": 80}), encoding="utf-8")
    assert "has 82 tokens, but its processor_config.json tells of 80" in refusal(action_tokenizer=folder)
    settings.write_text(json.dumps({"scale": 10}), encoding="utf-8")
    assert "does not hold a FAST tokenizer (KeyError('min_token'))" in refusal(action_tokenizer=folder)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    words.write_text("{}", encoding="utf-8")
    assert "tokenizer.json is no tokenizer" in refusal(action_tokenizer=folder)
    words.unlink()
    assert "does not hold a FAST tokenizer (FileNotFoundError" in refusal(action_tokenizer=folder)
