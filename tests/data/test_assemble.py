import dataclasses

import numpy as np
import pytest
import torch

from recap_ds.batch import CONTROL_IDS, NUM_AUGMENTATION_DRAWS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.data import sample
from recap_ds.data.assemble import Assembler, BatchDraws
from recap_ds.data.labels import LabelSet
from recap_ds.data.sample import check_data_matches
from recap_ds.errors import UsageError
from recap_ds.processing.images import decode_jpeg
from recap_ds.processing.normalize import Affine, Normalizer
from recap_ds.processing.tokens import ByteTokenizer, encode_prompts
from tests.data.tiny_shards import flat_episode, scale_of, tiny_config, write_tiny

G = 0.99 ** (1 / 4)  # per frame, of a chunk of 4


def assembler_of(shard_set, config, labels=None, action_tokenizer=None) -> Assembler:
    normalizer = Normalizer(
        "mean_std",
        Affine(np.zeros(3, np.float32), np.ones(3, np.float32), 4),
        Affine(np.zeros(2, np.float32), np.ones(2, np.float32), 3),
    )
    scale = scale_of(config, shard_set.manifest)
    return Assembler(shard_set, config, ByteTokenizer(), normalizer, scale, labels, action_tokenizer)


def batch_of(shard_set, frames: list[int], config=None, valid=None, labels=None, action_tokenizer=None):
    """The samples at ``frames`` of a folder that holds one episode."""
    config = config or tiny_config()
    assembler = assembler_of(shard_set, config, labels, action_tokenizer)
    samples = np.array([int(np.flatnonzero(shard_set.table.frame == frame)[0]) for frame in frames])
    size = len(samples)
    draws = BatchDraws(
        slot=np.arange(size),
        noise=np.zeros((size, 1, config.chunk_size, 3), np.float32),
        time=np.full((size, 1), 0.5, np.float32),
        indicator_dropped=np.zeros(size, bool),
        augmentation=np.zeros((size, NUM_AUGMENTATION_DRAWS), np.float32),
    )
    valid = np.ones(size, bool) if valid is None else np.array(valid)
    return assembler.stack(samples, [assembler.read(int(i)) for i in samples], draws, valid, np.zeros(size, bool))


def check_close(tensor: torch.Tensor, expected) -> None:
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=1e-6, atol=1e-6)


class Counting:
    """Every value is its own token."""

    vocab_size = 100

    def encode(self, actions):
        return (actions.flatten() + 50).astype(int).tolist()


def test_action_tokens_are_of_the_frames_and_dims_that_exist(tmp_path):
    config = tiny_config(model={**tiny_config().model.model_dump(), "max_action_tokens": 7})
    batch = batch_of(
        write_tiny(tmp_path, [flat_episode(2, 7)]), [0, 5, 6], config, [True, True, False], None, Counting()
    )
    # The robot has 2 of 3 dims; four frames are one token too many.
    check_close(batch.action_tokens, [[70, 50, 71, 49, 72, 48, 73], [75, 45, 76, 44, 0, 0, 0], [0] * 7])
    check_close(batch.action_token_mask, [[True] * 7, [True] * 4 + [False] * 3, [False] * 7])


def test_a_successful_episode_by_hand(tmp_path):
    # 7 frames: the task's longest, so L = 7. Windows of 4 frames from 0, 2, 3 and 6.
    batch = batch_of(write_tiny(tmp_path, [flat_episode(2, 7)]), [0, 2, 3, 6])
    check_close(batch.actions[1], [[22, -2, 0], [23, -3, 0], [24, -4, 0], [25, -5, 0]])
    check_close(batch.actions[3], [[26, -6, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    check_close(batch.action_valid, [[True] * 4, [True] * 4, [True] * 4, [True, False, False, False]])
    check_close(batch.action_dim_mask, [[True, True, False]] * 4)
    check_close(batch.td_action_valid, batch.action_valid.tolist())
    check_close(batch.td_valid, [True] * 4)
    assert batch.action_tokens.shape == batch.action_token_mask.shape == (4, 0)
    # From frame 3 the window of 4 holds the last frame, 6: the task ends in it, and its last reward is 0.
    check_close(batch.continues, [1, 1, 0, 0])
    check_close(batch.chunk_reward, [-(1 + G + G**2 + G**3) / 7, -(1 + G + G**2 + G**3) / 7, -(1 + G + G**2) / 7, 0])
    check_close(batch.chunk_discount, [G**4, G**4, G**4, G])
    check_close(batch.next_observation.state, [[2, 4, 1, 0], [2, 6, 1, 0], [0] * 4, [0] * 4])
    check_close(batch.next_observation.camera_mask, [[True] * 2, [True] * 2, [False] * 2, [False] * 2])
    check_close(batch.mc_return, [-6 / 7, -4 / 7, -3 / 7, 0])
    check_close(batch.mc_valid, [True] * 4)
    check_close(batch.steps_to_end, [6, 4, 3, 0])
    check_close(batch.outcome, [OUTCOME_IDS["success"]] * 4)
    check_close(batch.source, [SOURCE_IDS["demo"]] * 4)
    ids, mask = encode_prompts(ByteTokenizer(), ["pick the cube"], 20)
    for observation in (batch.observation, batch.next_observation):
        check_close(observation.tokens, np.repeat(ids, 4, axis=0).tolist())
        check_close(observation.token_mask, np.repeat(mask, 4, axis=0).tolist())


def test_a_failed_episode_pays_c_fail_at_its_last_frame(tmp_path):
    batch = batch_of(write_tiny(tmp_path, [flat_episode(0, 6, source="auto", outcome="failure")]), [1, 4])
    check_close(batch.continues, [1, 0])
    check_close(batch.chunk_reward, [-(1 + G + G**2 + G**3) / 6, -(1 + G * 6) / 6])
    check_close(batch.mc_return, [-1, -1])  # -(4 + 6) / 6 clips


def test_a_truncated_episode_bootstraps_from_its_last_observation(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 6, source="auto", outcome="truncated")])
    batch = batch_of(shard_set, [3, 5], tiny_config(value={"timeout_is": "truncated"}))
    # From 3 the window gives up frame 5; from 5 there is no window, yet the actions are still the policy's to learn.
    check_close(batch.td_valid, [True, False])
    check_close(batch.continues, [1, 1])
    check_close(batch.td_action_valid, [[True, True, False, False], [False] * 4])
    check_close(batch.action_valid, [[True, True, True, False], [True, False, False, False]])
    check_close(batch.next_observation.state[0], [0, 5, 1, 0])
    check_close(batch.mc_valid, [False, False])
    # Read as a failure it is one: the stored next observation is not used.
    failed = batch_of(shard_set, [3, 5], tiny_config())
    check_close(failed.td_valid, [True, True])
    check_close(failed.continues, [0, 0])
    check_close(failed.chunk_reward, [-(1 + G + G**2 * 6) / 6, -1])
    assert not failed.next_observation.images.any()


def test_nothing_reaches_over_a_change_of_control(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 10, source="intervention", human=slice(5, 10))])
    batch = batch_of(shard_set, [3, 5])
    check_close(batch.control, [CONTROL_IDS["policy"], CONTROL_IDS["human"]])
    check_close(batch.source, [SOURCE_IDS["auto"], SOURCE_IDS["intervention"]])
    check_close(batch.action_valid, [[True, True, False, False], [True] * 4])
    check_close(batch.td_action_valid, batch.action_valid.tolist())
    check_close(batch.chunk_reward[:1], [-(1 + G) / 10])
    check_close(batch.next_observation.state[:, 1], [5, 9])
    check_close(batch.continues, [1, 1])


def test_a_longer_chunk_than_the_td_window_shows_q_the_window_only(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 12)])
    batch = batch_of(shard_set, [0], tiny_config(chunk_size=6, iql={"horizon": "manifest"}))
    check_close(batch.action_valid, [[True] * 6])
    check_close(batch.td_action_valid, [[True] * 4 + [False] * 2])
    check_close(batch.chunk_discount, [0.99 ** (4 / 6)])


def test_rows_that_are_not_valid_take_no_part(tmp_path):
    batch = batch_of(write_tiny(tmp_path, [flat_episode(0, 7)]), [0, 1], valid=[True, False])
    for name in ("sample_valid", "td_valid", "mc_valid"):
        check_close(getattr(batch, name), [True, False])
    assert batch.action_valid[0].all() and not batch.action_valid[1].any() and not batch.td_action_valid[1].any()


def test_environment_rewards_leave_the_whole_return_unknown(tmp_path):
    rewards = np.arange(7, dtype=np.float32)
    shard_set = write_tiny(tmp_path, [dataclasses.replace(flat_episode(0, 7), rewards=rewards)])
    batch = batch_of(shard_set, [1, 5], tiny_config(value={"reward": "environment"}))
    check_close(batch.chunk_reward, [(1 + 2 * G + 3 * G**2 + 4 * G**3) / 7, (5 + 6 * G) / 7])
    check_close(batch.mc_valid, [False, False])


def test_an_index_that_means_another_next_observation_is_refused(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 12)])
    shard_set.table.next_offset[shard_set.table.frame == 2] = 3
    with pytest.raises(UsageError, match=r"1 samples store another next observation.*next_offset is 3, not 4"):
        assembler_of(shard_set, tiny_config())


def test_a_prompt_that_does_not_fit_stops_at_start(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 7)])
    with pytest.raises(UsageError, match=r"model\.max_prompt_tokens: 8 is too few"):
        assembler_of(shard_set, tiny_config(model={"max_prompt_tokens": 8}))


def test_labels_are_the_samples_own_and_zeros_without_any(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 7)])
    plain = batch_of(shard_set, [5, 0])
    check_close(plain.label_indicator, [0, 0])
    check_close(plain.label_advantage, [0.0, 0.0])
    frame = shard_set.table.frame
    stored = {"advantage": 0.1 * frame.astype(np.float32), "indicator": (frame % 3).astype(np.int8)}
    labels = LabelSet(None, stored, np.ones(1, np.float32))
    batch = batch_of(shard_set, [5, 0, 3], labels=labels)
    assert batch.label_indicator.dtype == torch.int64
    check_close(batch.label_indicator, [2, 0, 0])
    check_close(batch.label_advantage, [0.5, 0.0, 0.3])


def test_a_takeover_is_charged_to_every_frame_before_it_and_to_the_window_that_ends_in_it(tmp_path):
    # 10 frames, the human has 5..9. Half of L = 10 frames is charged to frame 4, the policy's last.
    shard_set = write_tiny(tmp_path, [flat_episode(0, 10, source="intervention", human=slice(5, 10))])
    free, charged = (
        batch_of(shard_set, [0, 1, 4, 5], tiny_config(value={"takeover_penalty": penalty})) for penalty in (0.0, 0.5)
    )
    check_close(free.mc_return, [-0.9, -0.8, -0.5, -0.4])
    check_close(charged.mc_return, [-1.0, -1.0, -1.0, -0.4])
    # The window of 0 ends one frame before the takeover.
    check_close(charged.chunk_reward[:1], free.chunk_reward[:1].tolist())
    check_close(charged.chunk_reward[1:3] - free.chunk_reward[1:3], [-(G**3) * 0.5, -0.5])
    check_close(charged.chunk_reward[3:], free.chunk_reward[3:].tolist())


def test_a_policy_stage_decodes_no_next_observation_and_carries_none(tmp_path, monkeypatch):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 12)])
    decoded = []
    monkeypatch.setattr(sample, "decode_jpeg", lambda data: decoded.append(data) or decode_jpeg(data))
    cameras, samples = 2, [0, 3, 7]
    policy = tiny_config(training={"stage": "policy"}, recap={"sft": True})
    for config, num_next in ((tiny_config(), 3), (policy, 0)):
        decoded.clear()
        batch = batch_of(shard_set, samples, config)
        assert len(decoded) == cameras * (len(samples) + num_next)
        assert batch.next_observation.images.shape[:2] == (3, cameras if num_next else 0)


def test_a_stage_without_td_reads_no_next_observation(tmp_path):
    shard_set = write_tiny(tmp_path, [flat_episode(0, 9)], store_next=False, td_horizon=3)
    for stage in (
        {"training": {"stage": "critic"}, "value": {"critic": "distributional"}},
        {"training": {"stage": "policy"}, "data": {"labels": "some"}},
    ):
        config = tiny_config(**stage)
        check_data_matches(config, shard_set.manifest)
        batch = batch_of(shard_set, [0, 4], config)
        assert not batch.next_observation.images.any() and batch.observation.images.any()
        check_close(batch.mc_return, [-8 / 9, -4 / 9])
    with pytest.raises(UsageError, match=r"chunk_size: 4 differs"):
        check_data_matches(tiny_config(training={"stage": "critic"}), shard_set.manifest)
    iql = tiny_config(training={"stage": "critic"}, iql={"horizon": "manifest"})
    with pytest.raises(UsageError, match=r"training\.stage: critic trains critics by TD.*no next observations"):
        check_data_matches(iql, shard_set.manifest)
