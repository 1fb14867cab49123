"""Samples and their draws -> TransitionBatch: what the index says of each row becomes masks, TD windows and returns.

Training and held-out evaluation both end here. All rows of a batch are computed together; nothing is random.

    B rows   N samples of the set   H chunk_size   A max_action_dim   F flow draws   L max_prompt_tokens
    M max_action_tokens, 0 without an action tokenizer
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.algo.returns import (
    ReturnRule,
    TaskScale,
    TdWindow,
    is_ended,
    monte_carlo_return,
    takeovers_ahead,
    td_window,
    window_steps,
)
from recap_ds.batch import Observation, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.labels import LabelSet
from recap_ds.data.sample import SampleArrays, SampleDecoder, View
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.processing.action_tokens import ActionTokenizer, encode_chunks
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.prompts import PromptEncoder
from recap_ds.processing.tokens import Tokenizer


class BatchDraws(NamedTuple):
    slot: np.ndarray  # [B] int64
    noise: np.ndarray  # [B, F, H, A] float32
    time: np.ndarray  # [B, F] float32 in (0, 1], 1 = noise
    indicator_dropped: np.ndarray  # [B] bool
    augmentation: np.ndarray  # [B, NUM_AUGMENTATION_DRAWS] float32


class Assembler:
    """Reads samples of one shard set and stacks them as one config wants them. Picklable: workers hold a copy."""

    def __init__(
        self,
        shard_set: ShardSet,
        config: PiStarRECAPConfig,
        tokenizer: Tokenizer,
        normalizer: Normalizer,
        scale: TaskScale,
        labels: LabelSet | None = None,
        action_tokenizer: ActionTokenizer | None = None,
    ):
        """``action_tokenizer``: of a run that learns action tokens."""
        self.shard_set = shard_set
        self.labels = labels
        self._decoder = SampleDecoder(shard_set.manifest, config, normalizer)
        self._scale = scale
        self._rule = ReturnRule(config.value.reward, config.frame_discount, config.value.timeout_is)
        self._chunk_size = config.chunk_size
        self._action_tokenizer = action_tokenizer
        self._max_action_tokens = 0 if action_tokenizer is None else config.model.max_action_tokens
        dims = torch.arange(config.max_action_dim)
        self._action_dim_mask = dims < shard_set.manifest.action_dim  # [A]
        self._prompts = [task.prompt for task in shard_set.manifest.tasks.values()]
        encoder = PromptEncoder(config, tokenizer, shard_set.manifest.state_dim)
        # A prompt that does not fit ends the run here, not in the middle of an epoch.
        encoder.check(self._prompts)
        # Workers are spared the tokenizer where every sample of a task is told the same.
        self._prompt_encoder = encoder if encoder.reads_state else None
        unread = np.zeros((len(self._prompts), config.max_state_dim), np.float32)
        self._task_tokens = _tensors(encoder.encode(self._prompts, unread))  # [num_tasks, L] each
        # A stage without TD reads no next observation, and may be given shards that have none.
        self._learns_by_td = config.learns_by_td
        if self._learns_by_td:
            self._check_next_observations()
        self._takeovers_ahead = self._count_takeovers() if config.value.takeover_penalty > 0 else None  # [N]

    def read(self, sample: int) -> SampleArrays:
        """Raises DamagedSample."""
        return self._decoder.read(self.shard_set, sample, self.needs_next(sample))

    def decode(self, sample: int, members: dict[str, bytes]) -> SampleArrays:
        """The same of members that were read elsewhere. Raises DamagedSample."""
        return self._decoder.decode_sample(self.shard_set, sample, members, self.needs_next(sample))

    def needs_next(self, sample: int) -> bool:
        """True = the TD target reads the sample's next observation."""
        return self._learns_by_td and bool(self._next_offsets(np.array([sample])) > 0)

    def blank(self) -> SampleArrays:
        return self._decoder.blank()

    def stack(
        self,
        samples: np.ndarray,
        arrays: Sequence[SampleArrays],
        draws: BatchDraws,
        sample_valid: np.ndarray,
        replaced: np.ndarray,
        image_lender: np.ndarray | None = None,
    ) -> TransitionBatch:
        """``samples`` [B] ids, ``arrays`` what ``read`` gave for each; rows not ``sample_valid`` take no part.

        ``image_lender`` [B]: rows; zeros where nobody asks.
        """
        table = self.shard_set.table
        task = self._column(table.task, samples)
        outcome, steps_to_end = self._column(table.outcome, samples), self._steps_to_end(samples)
        valid = torch.from_numpy(sample_valid)
        rewards = torch.from_numpy(np.stack([row.rewards for row in arrays]))
        window = self._td_window(samples, rewards)
        td_valid = window.valid & valid
        charge = None
        if self._takeovers_ahead is not None:
            charge = self._takeovers_ahead[torch.from_numpy(samples)] * self._scale.takeover_cost[task]
        mc_return, mc_valid = monte_carlo_return(
            steps_to_end,
            outcome,
            timeout_is=self._rule.timeout_is,
            failure_cost=self._scale.failure_cost[task],
            normaliser=self._scale.normaliser[task],
            takeover_charge=charge,
        )
        label_indicator, label_advantage = self._labels(samples)
        num_frames = self._column(table.num_valid, samples)
        action_valid = (torch.arange(self._chunk_size) < num_frames[:, None]) & valid[:, None]
        actions = np.stack([row.actions for row in arrays])
        action_tokens, action_token_mask = self._action_tokens(actions, action_valid)
        observation = self._observation([row.view for row in arrays], task)
        # Without TD nobody reads the next observation, whose prompt is then as good as any.
        next_prompt = None if self._learns_by_td else (observation.tokens, observation.token_mask)
        return TransitionBatch(
            observation=observation,
            actions=torch.from_numpy(actions),
            action_valid=action_valid,
            action_dim_mask=self._action_dim_mask.expand(len(samples), -1).contiguous(),
            action_tokens=action_tokens,
            action_token_mask=action_token_mask,
            next_observation=self._observation([row.next_view for row in arrays], task, next_prompt),
            td_valid=td_valid,
            td_action_valid=(torch.arange(self._chunk_size) < window.steps[:, None]) & td_valid[:, None],
            chunk_reward=window.chunk_reward,
            chunk_discount=window.chunk_discount,
            continues=window.continues,
            mc_return=mc_return,
            # What the rest of the episode would have paid is not stored: only sparse rewards follow from its length.
            mc_valid=mc_valid & valid & (self._rule.reward == "sparse_time"),
            label_indicator=label_indicator,
            label_advantage=label_advantage,
            task=task,
            source=self._column(table.source, samples),
            control=self._column(table.control, samples),
            outcome=outcome,
            steps_to_end=steps_to_end,
            sample_valid=valid,
            replaced=torch.from_numpy(replaced),
            image_lender=torch.from_numpy(np.zeros(len(samples), np.int64) if image_lender is None else image_lender),
            slot=torch.from_numpy(draws.slot),
            noise=torch.from_numpy(draws.noise),
            time=torch.from_numpy(draws.time),
            indicator_dropped=torch.from_numpy(draws.indicator_dropped),
            augmentation=torch.from_numpy(draws.augmentation),
        )

    def _observation(
        self, views: Sequence[View], task: Tensor, prompt: tuple[Tensor, Tensor] | None = None
    ) -> Observation:
        states = np.stack([view.state for view in views])
        # The prompt stays where there is no next observation: attention over nothing at all would be NaN.
        tokens, token_mask = prompt or self._prompt_tokens(task, states)
        return Observation(
            images=torch.from_numpy(np.stack([view.images for view in views])),
            camera_mask=torch.from_numpy(np.stack([view.camera_mask for view in views])),
            tokens=tokens,
            token_mask=token_mask,
            state=torch.from_numpy(states),
        )

    def _prompt_tokens(self, task: Tensor, states: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, L]."""
        if self._prompt_encoder is None:
            ids, mask = self._task_tokens
            return ids[task], mask[task]
        return _tensors(self._prompt_encoder.encode([self._prompts[index] for index in task.tolist()], states))

    def _action_tokens(self, actions: np.ndarray, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, M] of ``actions`` [B, H, A]."""
        num_dims = self.shard_set.manifest.action_dim
        chunks = [chunk[:length, :num_dims] for chunk, length in zip(actions, valid.sum(dim=1).tolist(), strict=True)]
        return _tensors(encode_chunks(self._action_tokenizer, chunks, self._max_action_tokens))

    def _steps_to_end(self, samples: np.ndarray) -> Tensor:
        table = self.shard_set.table
        return self._column(table.episode_length, samples) - 1 - self._column(table.frame, samples)

    def _td_window(self, samples: np.ndarray, rewards: Tensor) -> TdWindow:
        table = self.shard_set.table
        task = self._column(table.task, samples)
        return td_window(
            self._steps_to_end(samples),
            self._column(table.num_valid, samples),
            self._column(table.outcome, samples),
            td_horizon=self.shard_set.manifest.td_horizon,
            rule=self._rule,
            failure_cost=self._scale.failure_cost[task],
            normaliser=self._scale.normaliser[task],
            rewards=rewards,
            control=self._column(table.control, samples),
            takeover_cost=self._scale.takeover_cost[task],
        )

    def _labels(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Indicator [B] int64 and advantage [B] float32; zeros where the run reads no labels."""
        if self.labels is None:
            return torch.zeros(len(samples), dtype=torch.int64), torch.zeros(len(samples))
        return self._column(self.labels.indicator, samples), torch.from_numpy(self.labels.advantage[samples])

    def _count_takeovers(self) -> Tensor:
        table, everything = self.shard_set.table, np.arange(self.shard_set.num_samples)
        columns = [self._column(values, everything) for values in (table.episode, table.frame, table.num_valid)]
        ahead = takeovers_ahead(*columns, self._steps_to_end(everything), self._column(table.control, everything))
        return ahead.to(torch.int32)  # half of what every worker has to hold

    def _next_offsets(self, samples: np.ndarray) -> np.ndarray:
        """[n] int64, frames from each sample to the next observation that its TD target reads; 0 = it reads none."""
        table = self.shard_set.table
        ended = is_ended(self._column(table.outcome, samples), self._rule.timeout_is)
        num_valid = self._column(table.num_valid, samples)
        horizon = self.shard_set.manifest.td_horizon
        steps, continues = window_steps(self._steps_to_end(samples), num_valid, ended, horizon)
        return (steps * continues).numpy()

    def _check_next_observations(self) -> None:
        """UsageError where another one is stored than the TD target means."""
        shard_set = self.shard_set
        num_wrong, first = 0, None
        # In parts, not at once: all of them would be gigabytes for a large set.
        for start in range(0, shard_set.num_samples, 2**18):
            samples = np.arange(start, min(start + 2**18, shard_set.num_samples))
            offsets = self._next_offsets(samples)
            wrong = np.flatnonzero((offsets > 0) & (offsets != shard_set.table.next_offset[samples]))
            num_wrong += len(wrong)
            if first is None and len(wrong):
                first = int(samples[wrong[0]]), int(offsets[wrong[0]])
        if first is None:
            return
        sample, needed = first
        found = shard_set.damaged(sample, f"next_offset is {shard_set.table.next_offset[sample]}")
        raise UsageError(
            f"{shard_set.folder}: {num_wrong} samples store another next observation than a TD window of "
            f"{shard_set.manifest.td_horizon} frames needs (first: {found}, not {needed}); import the data again"
        )

    @staticmethod
    def _column(values: np.ndarray, samples: np.ndarray) -> Tensor:
        return torch.from_numpy(values[samples].astype(np.int64))


def _tensors(arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
