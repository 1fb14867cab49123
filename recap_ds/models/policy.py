"""PiStarRECAPPolicy: VLM, action expert, critic and target critic in one container, as far as its stage needs them.

One ``forward`` gives the whole optimizer step, so that one engine, one forward and one backward serve it: every
trainable parameter takes part in every step (ZeRO-3 would re-apply the stale gradient of one that does not), and under
an engine nothing but ``engine(batch, ...)`` runs. The class is plain PyTorch: no ranks, no engine, no files.

    B batch   H chunk   A action dims
"""

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import Observation, TransitionBatch
from recap_ds.config import ModelConfig, PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.backbones import build_vlm
from recap_ds.models.building import Builder
from recap_ds.models.critic_stage import CriticParts, critic_evaluation, critic_step
from recap_ds.models.critics import Critic, QNetworks
from recap_ds.models.experts import build_expert
from recap_ds.models.export_weights import load_export, load_state, save_export, save_state
from recap_ds.models.hub import Push, push_export
from recap_ds.models.joint import Parts, joint_evaluation, joint_step
from recap_ds.models.losses import (
    EvaluationOutput,
    LossNormalizers,
    TrainOutput,
    count_flow_elements,
    local_counts,
    normalizers,
    value_mask,
    without_padding,
)
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy_stage import PolicyParts, policy_evaluation, policy_step
from recap_ds.models.sampling import AdvantageName, sample_actions
from recap_ds.models.value_head import DistributionalCritic
from recap_ds.processing.contract import RobotContract


class PiStarRECAPPolicy(nn.Module):
    """``builder`` says how parameters come to be; ``vlm_folder`` overrides where the VLM is read from."""

    def __init__(self, config: PiStarRECAPConfig, builder: Builder | None = None, vlm_folder: str | None = None):
        super().__init__()
        builder = builder or Builder()
        model = config.model
        self.config = config
        # Fixed seed, whatever ran before: a restart, another world size and plain PyTorch begin from the same weights.
        with torch.random.fork_rng(devices=[]):
            self.vlm = build_vlm(config, builder, vlm_folder)
            # Again: how many numbers the VLM's construction drew differs between plain and sharded.
            torch.manual_seed(config.training.seed)
            with builder.context():
                self._build_heads(model, self.vlm.width)
        if "target_critic" in config.heads:
            self.target_critic.requires_grad_(False)
            builder.copy(self.critic.q, self.target_critic)
        if config.training.activation_checkpointing:
            if "action_expert" in config.heads:
                self.action_expert.activation_checkpointing = True
            if self.vlm.trainable:
                self.vlm.enable_activation_checkpointing()
        # Set by from_pretrained: what the policy and a robot must agree on, and where its own tokenizer is.
        self.contract: RobotContract | None = None
        self.tokenizer_folder: Path | None = None
        self._queue: deque[Tensor] = deque()

    def _build_heads(self, model: ModelConfig, width: int) -> None:
        """``config.heads``, and no more: a head without a loss would be stepped by gradients that are not its own."""
        config = self.config
        action_dim, state_dim = config.max_action_dim, config.max_state_dim
        if "action_expert" in config.heads:
            self.action_expert = build_expert(config, self.vlm.network)
        if "target_critic" in config.heads:
            self.critic = Critic(model, width, state_dim, config.chunk_size, action_dim)
            # The Q networks' slow twin; under an engine distributed.shadows moves it.
            self.target_critic = QNetworks(model, width, state_dim, config.chunk_size, action_dim)
        elif "critic" in config.heads:
            read_dim = state_dim if config.value.reads_state else None
            self.critic = DistributionalCritic(model, width, read_dim, config.value.num_bins)

    # -- one optimizer step -------------------------------------------------------------------------------------

    def forward(
        self,
        batch: TransitionBatch,
        mode: Literal["train", "evaluate"],
        scale: AdvantageScale,
        normalizers: LossNormalizers,
        warming_up: bool,
    ) -> TrainOutput | EvaluationOutput:
        """One micro-batch of the stage: its loss in mode train, held-out measures in mode evaluate.

        ``scale``: per-task thresholds as of the step before, in stage policy those of the labels; ``normalizers``: the
        whole step's valid counts.
        """
        batch = without_padding(batch)
        if mode == "evaluate":
            with self._no_dropout():
                return self._evaluate(batch)
        config = self.config
        augmented = self.training and config.data.augmentation == "shift_and_color"
        match config.training.stage:
            case "joint":
                return joint_step(self._joint(), config, batch, scale, normalizers, warming_up, augmented)
            case "critic":
                return critic_step(self._critic(), config, batch, normalizers, augmented)
            case "policy":
                return policy_step(self._policy(), config, batch, scale.sigma, normalizers, augmented)

    def _evaluate(self, batch: TransitionBatch) -> EvaluationOutput:
        match self.config.training.stage:
            case "joint":
                return joint_evaluation(self._joint(), self.config, batch)
            case "critic":
                return critic_evaluation(self._critic(), self.config, batch)
            case "policy":
                return policy_evaluation(self._policy(), self.config, batch)

    def _joint(self) -> Parts:
        return Parts(self.vlm, self.action_expert, self.critic, self.target_critic)

    def _critic(self) -> CriticParts:
        return CriticParts(self.vlm, self.critic, self.target_critic if "target_critic" in self.config.heads else None)

    def _policy(self) -> PolicyParts:
        return PolicyParts(self.vlm, self.action_expert)

    @contextmanager
    def _no_dropout(self) -> Iterator[None]:
        """Evaluation mode inside, so that nothing is drawn from the global generator."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    # -- plain PyTorch ------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        """Trainable parameters in the groups vlm, action_expert, critic, each with its own peak learning rate."""
        training, decay = self.config.training, self.config.training.weight_decay
        rates = {
            "vlm": training.vlm_learning_rate,
            "action_expert": training.learning_rate,
            "critic": training.critic_learning_rate,
        }
        groups = []
        for name in ("vlm", *(head for head in self.config.heads if head in rates)):
            parameters = [p for p in self.get_submodule(name).parameters() if p.requires_grad]
            if parameters:
                groups.append({"name": name, "params": parameters, "lr": rates[name], "weight_decay": decay})
        return groups

    def configure_optimizers(self) -> torch.optim.AdamW:
        training = self.config.training
        return torch.optim.AdamW(self.parameter_groups(), lr=training.learning_rate, betas=training.betas)

    def training_step(self, batch: TransitionBatch, scale: AdvantageScale | None = None) -> dict[str, Tensor]:
        """Losses of one batch on its own; call ``loss.backward()`` and, after each step, ``update_targets()``.

        Without a ``scale`` (an AdvantageRing's) only forced-positive samples carry an indicator, and in stage policy
        nothing is weighed by its advantage. What the stage has no loss for is not in the result.
        """
        if scale is None:
            num_tasks, device = int(batch.task.max()) + 1, batch.task.device
            infinite = torch.full((num_tasks,), torch.inf, device=device)
            scale = AdvantageScale(infinite, infinite, torch.zeros(num_tasks, dtype=torch.bool, device=device))
        counts = normalizers(local_counts(batch))
        output = self(batch, "train", scale, counts, warming_up=False)
        sums = {
            "policy_loss": (output.policy_loss, count_flow_elements(batch), counts.flow),
            "q_loss": (output.q_loss, 1.0, counts.td),
            "v_loss": (output.v_loss, 1.0, value_mask(self.config, batch).sum().clamp(min=1)),
            "action_token_loss": (output.action_token_loss, batch.action_token_mask.sum(dim=1), counts.action_tokens),
        }
        means = {name: (loss * each).sum() / count for name, (loss, each, count) in sums.items() if loss is not None}
        if output.advantage is not None:
            means["advantage"] = output.advantage
        return {"loss": output.loss, **means}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Polyak step of the target critic, if there is one; under an engine ``distributed.shadows`` does this."""
        if "target_critic" not in self.config.heads:
            return
        online = self.critic.q.parameters()
        for target, source in zip(self.target_critic.parameters(), online, strict=True):
            target.lerp_(source, self.config.iql.target_update_rate)

    @torch.no_grad()
    def predict_action_chunk(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        action_dim_mask: Tensor | None = None,
        advantage: AdvantageName | Sequence[AdvantageName] = "positive",
        guidance_beta: float | Sequence[float] = 1.0,
        num_steps: int | None = None,
    ) -> Tensor:
        """Actions [B, H, A] in normalised units, from ``noise`` [B, H, A] (drawn if not given).

        ``advantage`` and ``guidance_beta`` hold for all rows, or are sequences with one for each. A policy of
        ``policy_extraction: weighted`` was trained without indicators: it acts without one, always.
        """
        if self.config.training.stage == "critic":
            raise UsageError("a policy of stage critic judges and does not act; load one of stage policy or joint")
        if self.config.recap.policy_extraction == "weighted":
            advantage = None
        batch_size, device = observation.state.shape[0], observation.state.device
        shape = (batch_size, self.config.chunk_size, self.config.max_action_dim)
        if noise is None:
            noise = torch.randn(shape, device=device)
        if action_dim_mask is None:
            action_dim_mask = torch.ones(batch_size, shape[2], dtype=torch.bool, device=device)
        steps = num_steps or self.config.num_inference_steps
        with self._no_dropout():
            prefix = self.vlm(observation, to_pixels(observation.images))
            return sample_actions(
                self.action_expert, prefix, observation.state, noise, action_dim_mask, advantage, guidance_beta, steps
            )

    def select_action(self, observation: Observation, **options) -> Tensor:
        """Next action [B, A] of the queued chunk; a new chunk is predicted when the queue is empty."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(observation, **options).unbind(dim=1))
        return self._queue.popleft()

    def reset(self) -> None:
        """Forget the queued chunk: call between episodes."""
        self._queue.clear()

    # -- files (formats: export_format.py, export_weights.py) ---------------------------------------------------

    @classmethod
    def from_pretrained(cls, export: str | Path, revision: str | None = None) -> "PiStarRECAPPolicy":
        """From an export folder or the hub id of one: on the CPU, float32, in eval mode, with its ``contract``."""
        return load_export(cls, export, revision=revision)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write an export, in float32; ``overwrite`` replaces an older one."""
        save_export(self, folder, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **options: Any) -> Push:
        """Save an export and upload it; ``options`` are those of ``hub.push_export``, which takes one as it lies."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "export")
            return push_export(Path(folder) / "export", repo_id, **options)

    def save_checkpoint(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """All parameters in one safetensors file, with ``metadata`` (JSON) in its header."""
        save_state(self, path, metadata)

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Fill this policy from ``save_checkpoint``'s file and return the metadata. Everything must fit."""
        return load_state(self, path)
