import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from recap_ds.errors import UsageError
from recap_ds.processing.tokens import ByteTokenizer, build_tokenizer, encode_prompts


@pytest.fixture
def tokenizer_folder(tmp_path):
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "pick": 3, "the": 4, "cube": 5, "\n": 6, "<unk>": 7, " ": 8}
    fast = FastTokenizer(WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_bytes_by_hand():
    ids, mask = encode_prompts(ByteTokenizer(), ["ab", "\u00e9"], 6)
    np.testing.assert_array_equal(ids, [[2, 100, 101, 13, 0, 0], [2, 0xC3 + 3, 0xA9 + 3, 13, 0, 0]])
    np.testing.assert_array_equal(mask, [[True] * 4 + [False] * 2] * 2)
    assert ids.max() < ByteTokenizer.vocab_size <= 512


def test_inner_newlines_and_outer_space_do_not_reach_the_model():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("  pick\nit ") == tokenizer.encode("pick it")
    assert tokenizer.encode("") == [2, 13]


def test_a_prompt_that_just_fits_and_one_that_does_not():
    ids, mask = encode_prompts(ByteTokenizer(), ["abcd"], 6)
    assert mask.all() and ids[0, -1] == 13
    with pytest.raises(
        UsageError, match=r"model.max_prompt_tokens: 6 is too few for the 7 tokens of 'abcde'.*at least 7"
    ):
        encode_prompts(ByteTokenizer(), ["ab", "abcde"], 6)


def test_hugging_face_folder(tokenizer_folder):
    tokenizer = build_tokenizer(str(tokenizer_folder))
    ids, mask = encode_prompts(tokenizer, ["pick the cube", "cube"], 6)
    np.testing.assert_array_equal(ids, [[2, 3, 4, 5, 6, 0], [2, 5, 6, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(axis=1), [5, 3])
    assert tokenizer.vocab_size == 9


def test_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"model.vlm_model_name: no tokenizer") as caught:
        build_tokenizer(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)


def test_tiny_needs_no_files():
    assert isinstance(build_tokenizer("tiny"), ByteTokenizer)
