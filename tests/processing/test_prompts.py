"""Prompts in both forms, by hand; and that training and a robot's loop write the same one."""

import pickle

import numpy as np
import pytest
import torch

from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.errors import UsageError
from recap_ds.models.observation import ObservationEncoder
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.prompts import PromptEncoder, pi05_prompt, state_bins
from recap_ds.processing.tokens import BOS_ID, ByteTokenizer, build_tokenizer, encode_prompts
from tests.data.tiny_shards import flat_episode, scale_of, tiny_config, write_tiny
from tests.made_export import contract_of
from tests.processing.test_tokens import tokenizer_folder  # noqa: F401

PI05 = {"normalization": "quantile", "prompt_format": "pi05"}


def config_of(max_prompt_tokens=60, **data):
    return tiny_config(data={**PI05, **data}, model={"max_prompt_tokens": max_prompt_tokens})


def read(ids, mask) -> str:
    """What the byte tokenizer was given, behind <bos>."""
    assert ids[0] == BOS_ID and not mask[mask.sum() :].any()
    return bytes(int(token) - ByteTokenizer.first_byte_id for token in ids[1 : mask.sum()]).decode()


def test_bins_of_the_reference_case():
    values = np.array([-1, -0.999, 0, 0.5, 0.9999, 1, 1.2, -1.3])
    assert state_bins(values).tolist() == [0, 0, 128, 192, 255, 255, 255, -1]


def test_the_text_is_openpis():
    assert pi05_prompt(" pick_up the\ncube ", [3, -1, 255]) == "Task: pick up the cube, State: 3 -1 255;\nAction: "


def test_the_robots_dims_alone_are_told():
    encoder = PromptEncoder(config_of(), ByteTokenizer(), state_dim=2)
    states = np.array([[0.0, 1.0, 0.5], [-2.0, -1.0, 0.5]], np.float32)
    (first, second), masks = encoder.encode(["push", "pull"], states)
    assert read(first, masks[0]) == "Task: push, State: 128 255;\nAction: "
    assert read(second, masks[1]) == "Task: pull, State: -1 0;\nAction: "


def test_plain_prompts_know_no_state():
    encoder = PromptEncoder(tiny_config(model={"max_prompt_tokens": 8}), ByteTokenizer(), state_dim=2)
    assert not encoder.reads_state
    for mine, expected in zip(
        encoder.encode(["push"], np.ones((1, 3))), encode_prompts(ByteTokenizer(), ["push"], 8), strict=True
    ):
        np.testing.assert_array_equal(mine, expected)


def test_a_prompt_that_might_not_fit_is_said_at_start():
    longest = len("Task: push, State: 255 255;\nAction: ") + 1
    PromptEncoder(config_of(longest), ByteTokenizer(), 2).check(["push"])
    with pytest.raises(UsageError, match=rf"max_prompt_tokens: {longest - 1} is too few for the {longest} tokens"):
        PromptEncoder(config_of(longest - 1), ByteTokenizer(), 2).check(["push"])


def test_a_tokenizer_of_a_folder(tokenizer_folder):  # noqa: F811
    tokenizer = build_tokenizer(str(tokenizer_folder))
    assert tokenizer.encode_text("pick the cube") == [2, 3, 4, 5]  # no newline behind it
    # Workers of the loader are sent a copy, which is made so.
    encoder = PromptEncoder(config_of(), tokenizer, state_dim=1)
    sent = pickle.loads(pickle.dumps(encoder))
    expected, states = encoder.encode(["pick"], np.zeros((1, 1))), np.zeros((1, 1))
    assert all(np.array_equal(a, b) for a, b in zip(sent.encode(["pick"], states), expected, strict=True))


@pytest.fixture
def shard_set(tmp_path):
    return write_tiny(tmp_path / "shards", [flat_episode(0, 9), flat_episode(1, 7, source="auto")])


def batch_of(shard_set, samples, config):
    manifest, size = shard_set.manifest, len(samples)
    normalizer = Normalizer.of(manifest.merged_statistics("state"), manifest.merged_statistics("actions"), config)
    assembler = Assembler(shard_set, config, ByteTokenizer(), normalizer, scale_of(config, manifest))
    draws = BatchDraws(np.arange(size), *np.zeros((4, size), np.float32))
    arrays = [assembler.read(sample) for sample in samples]
    return assembler.stack(np.array(samples), arrays, draws, np.ones(size, bool), np.zeros(size, bool))


def test_training_and_the_robots_loop_say_and_see_the_same(shard_set):
    slots = {"base_0_rgb": "right", "left_wrist_0_rgb": None, "right_wrist_0_rgb": "left"}
    config = config_of(camera_slots=slots)
    batch = batch_of(shard_set, [0, 4, 11], config).observation
    contract = contract_of(shard_set, config).model_copy(update={"cameras": ("right", "left"), "camera_slots": slots})
    encoder = ObservationEncoder(config, contract, ByteTokenizer())
    table = shard_set.table
    for row, sample in enumerate([0, 4, 11]):
        # Episode 0 is the demonstration, 1 the autonomous one.
        episode, t = flat_episode(int(table.source[sample]), 9), int(table.frame[sample])
        seen = {f"observation/{name}": pictures[0] for name, pictures in episode.read_frames([t]).items()}
        found = encoder.encode([{**seen, "observation/state": episode.states[t], "prompt": episode.prompt}])
        assert found.camera_mask.tolist() == [[True, False, True]] and not found.images[0, 1].any()
        for name in ("camera_mask", "tokens", "token_mask", "state"):
            mine, trained = getattr(found, name)[0], getattr(batch, name)[row]
            assert mine.dtype == trained.dtype and torch.equal(mine, trained), name
        assert (found.images[0].int() - batch.images[row].int()).abs().max() <= 2  # stored as JPEG
        bins = " ".join(map(str, state_bins(found.state[0, :3].numpy())))
        assert read(found.tokens[0], found.token_mask[0]) == f"Task: pick the cube, State: {bins};\nAction: "


def test_the_next_observation_has_a_prompt_of_its_own(shard_set):
    batch = batch_of(shard_set, [0], config_of())
    for seen in (batch.observation, batch.next_observation):
        bins = " ".join(map(str, state_bins(seen.state[0, :3].numpy())))
        assert read(seen.tokens[0], seen.token_mask[0]) == f"Task: pick the cube, State: {bins};\nAction: "
    assert not torch.equal(batch.observation.tokens, batch.next_observation.tokens)
