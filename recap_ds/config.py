"""The whole configuration of recap_ds: its sections, the rules between them, and what follows from them.

Defaults < recipe YAML < ``section.key=value``; reading those is ``recipe.py``'s work. DeepSpeed's JSON owns sharding,
offload, precision and communication, and nothing that stands here (``distributed/ds_config.py`` refuses it).
"""

from pydantic import Field, model_validator

from recap_ds.errors import UsageError
from recap_ds.job_sections import CollectConfig, EnvConfig, EvaluationConfig, LabelConfig
from recap_ds.sections import (
    SOURCES,
    CheckpointConfig,
    DataConfig,
    IQLConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    RecapConfig,
    Section,
    SourceName,
    TrainingConfig,
    ValueConfig,
    VlmSource,
)

# What the rest of the package imports from here: the sections belong to the configuration, wherever they are written.
__all__ = [
    "SOURCES",
    "BatchSizes",
    "CheckpointConfig",
    "CollectConfig",
    "DataConfig",
    "EnvConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "PiStarRECAPConfig",
    "SourceName",
    "TrainingConfig",
    "ValueConfig",
    "VlmSource",
    "batch_sizes",
]


class PiStarRECAPConfig(Section):
    """The whole configuration. ``PiStarRECAPConfig(chunk_size=10, model={...})`` works in plain PyTorch."""

    name: str = Field("pi_star_recap", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    chunk_size: int = Field(10, ge=1)
    # States and actions are zero-padded to these widths, so that robots can share a model.
    max_action_dim: int = Field(14, ge=1)
    max_state_dim: int = Field(14, ge=1)
    num_inference_steps: int = Field(10, ge=1)

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    iql: IQLConfig = Field(default_factory=IQLConfig)
    value: ValueConfig = Field(default_factory=ValueConfig)
    recap: RecapConfig = Field(default_factory=RecapConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    label: LabelConfig = Field(default_factory=LabelConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    collect: CollectConfig = Field(default_factory=CollectConfig)

    @model_validator(mode="after")
    def _rules_between_sections(self):
        if self.lora.enabled and not self.model.freeze_vlm:
            raise ValueError("lora.enabled: adapters sit on a frozen VLM; set model.freeze_vlm=true")
        if self.training.num_warmup_steps >= self.training.num_training_steps:
            raise ValueError(
                f"training.num_warmup_steps: {self.training.num_warmup_steps} warm-up steps leave nothing of "
                f"{self.training.num_training_steps} training steps"
            )
        if self.recap.advantage_window_min > self.recap.advantage_window:
            raise ValueError("recap.advantage_window_min: cannot exceed recap.advantage_window")
        if self.model.conv_stem and self.vlm_source.name != "tiny":
            raise ValueError("model.conv_stem: only the tiny VLM has one")
        tables = {f"data.mixture_schedule.{step}": table for step, table in self.data.mixture_schedule.items()}
        for key, weights in (
            tables if self.data.mixture is None else {"data.mixture": self.data.mixture} | tables
        ).items():
            if not any(weight > 0 for weight in weights.values()):
                raise ValueError(f"{key}: no source has a positive weight")
        self._check_observation()
        return self

    @model_validator(mode="after")
    def _rules_of_the_stage(self):
        stage, distributional = self.training.stage, self.value.critic == "distributional"
        if distributional and stage == "joint":
            raise ValueError("value.critic: distributional is trained in stage critic; stage joint takes iql")
        if distributional and self.value.reward == "environment":
            raise ValueError("value.critic: distributional learns sparse_time returns; set value.reward=sparse_time")
        if not self.value.reads_state and not distributional:
            raise ValueError("value.reads_state: IQL critics always read the state; set value.critic=distributional")
        if self.learns_action_tokens:
            self._check_action_tokens()
        elif self.model.stop_gradient and not self.vlm_is_frozen and stage == "policy":
            raise ValueError(
                "model.stop_gradient: in stage policy nothing but the expert trains the VLM; set model.freeze_vlm=true "
                "and lora.enabled=false, or model.action_token_weight, or let the expert train it"
            )
        if self.is_told_in_words and self.recap.policy_extraction == "weighted":
            raise ValueError(
                "model.advantage_conditioning: text, but recap.policy_extraction=weighted trains without an indicator; "
                "set embedding, or recap.policy_extraction=conditioned or both"
            )
        self._check_backbone()
        if stage == "policy":
            self._check_labels()
        elif self.data.labels is not None or self.recap.sft:
            key = "recap.sft" if self.recap.sft else "data.labels"
            raise ValueError(f"{key}: only stage policy reads it, and training.stage is {stage}; leave it out")
        self._check_gate(has_values=stage != "policy", has_nll=distributional and stage == "critic")
        return self

    def _check_observation(self) -> None:
        data, model = self.data, self.model
        if data.camera_slots is not None:
            filled = [camera for camera in data.camera_slots.values() if camera is not None]
            if data.cameras is not None:
                raise ValueError("data.camera_slots: says what data.cameras says; leave one of them out")
            if not filled or len(set(filled)) < len(filled):
                raise ValueError("data.camera_slots: needs a camera in at least one slot, and none in two")
        if data.prompt_format == "plain":
            return
        if data.normalization != "quantile":
            raise ValueError(
                "data.prompt_format: pi05 writes states of [-1, 1] in bins; set data.normalization=quantile, or plain"
            )
        if "action_expert" in self.heads and (model.action_expert, model.pi_version) == ("pi_joint", "pi0"):
            raise ValueError(
                "data.prompt_format: pi05, but model.pi_version=pi0 is shown the state by itself; set plain"
            )
        if "critic" in self.heads and not self.value.reads_state:
            raise ValueError(
                "data.prompt_format: pi05 tells the state, and value.reads_state=false hides it; set plain"
            )

    def _check_action_tokens(self) -> None:
        key = "model.action_token_weight"
        if self.model.action_expert != "pi_joint":
            raise ValueError(
                f"{key}: tokens attend to every layer of the VLM, which is kept for pi_joint alone; set "
                "model.action_expert=pi_joint, or 0"
            )
        if self.vlm_is_frozen:
            raise ValueError(
                f"{key}: would train the VLM, which is frozen; set lora.enabled=true or model.freeze_vlm=false, or 0"
            )
        if self.data.normalization != "quantile":
            raise ValueError(f"{key}: tokens stand for actions of [-1, 1]; set data.normalization=quantile, or 0")

    def _check_backbone(self) -> None:
        value = self.value
        if value.backbone == "shared":
            for key in ("vlm_model_name", "vlm_revision"):
                if value.model_dump()[key] is not None:
                    raise ValueError(
                        f"value.{key}: only a backbone of the critic's own reads it; set value.backbone=own"
                    )
            return
        if self.training.stage == "joint":
            raise ValueError(
                "value.backbone: own is for stage critic; in stage joint critics share the policy's VLM, set shared"
            )
        if self.training.stage == "policy":
            raise ValueError("value.backbone: stage policy has no critic to have a VLM of its own; set shared")
        if value.vlm_model_name in (None, "tiny"):
            raise ValueError(
                "value.vlm_model_name: value.backbone=own needs a hub id or a folder with config.json"
                + ("; the tiny VLM is to be had with value.backbone=shared" if value.vlm_model_name else "")
            )

    def _check_labels(self) -> None:
        if self.recap.sft and self.data.labels is not None:
            raise ValueError("recap.sft: takes every sample as positive, so it reads no data.labels; leave one out")
        if self.recap.sft and self.recap.policy_extraction != "conditioned":
            raise ValueError("recap.sft: has no advantages to weigh with; set recap.policy_extraction=conditioned")
        if not self.recap.sft and self.data.labels is None:
            raise ValueError(
                "data.labels: stage policy needs the tag of labels that launch/label.py wrote (or recap.sft=true)"
            )

    def _check_gate(self, has_values: bool, has_nll: bool) -> None:
        gate = self.evaluation.gate
        if not has_values and gate != "loss":
            raise ValueError(f"evaluation.gate: stage policy has no value function to take '{gate}' of; set loss")
        if gate == "nll" and not has_nll:
            raise ValueError("evaluation.gate: nll is a figure of value.critic=distributional in stage critic")
        if self.training.early_stop_evaluations is not None and self.data.held_out_fraction == 0:
            raise ValueError("training.early_stop_evaluations: needs held-out episodes; raise data.held_out_fraction")

    @property
    def vlm_source(self) -> VlmSource:
        """Of the one VLM that the run builds."""
        source, value = self.model.vlm_source, self.value
        if not self.has_own_backbone:
            return source
        return VlmSource("value.vlm_model_name", value.vlm_model_name, value.vlm_revision, source.random_init)

    @property
    def has_own_backbone(self) -> bool:
        """True = the critic's VLM is a model of ``value.vlm_model_name``; nothing of it ever reaches a policy."""
        return self.value.backbone == "own" and self.value.vlm_model_name is not None

    @property
    def vlm_is_frozen(self) -> bool:
        """True = no gradient reaches it, not even into adapters."""
        return self.model.freeze_vlm and not self.lora.enabled

    @property
    def is_told_in_words(self) -> bool:
        """True = the policy reads its advantage as text, which is encoded beside the prefix."""
        return self.model.advantage_conditioning == "text" and "action_expert" in self.heads

    @property
    def learns_action_tokens(self) -> bool:
        """True = the VLM is also trained to predict actions as tokens."""
        return self.model.action_token_weight > 0 and "action_expert" in self.heads

    @property
    def num_action_tokens(self) -> int:
        """Places for them in every batch."""
        return self.model.max_action_tokens if self.learns_action_tokens else 0

    @property
    def learns_by_td(self) -> bool:
        """True = the stage's critic reads TD windows and next observations."""
        return self.value.critic == "iql" and self.training.stage != "policy"

    @property
    def heads(self) -> tuple[str, ...]:
        """What the stage builds beside the VLM, by the names of the policy's children."""
        policy = () if self.training.stage == "critic" else ("action_expert",)
        if self.training.stage == "policy":
            return policy
        return (*policy, "critic", "target_critic") if self.value.critic == "iql" else (*policy, "critic")

    @property
    def frame_discount(self) -> float:
        """Discount of one native frame."""
        return self.iql.discount ** (1.0 / self.chunk_size)

    @property
    def has_dropout(self) -> bool:
        return self.model.action_expert_dropout > 0 or (self.lora.enabled and self.lora.dropout > 0)

    @property
    def indicator_warmup_steps(self) -> int:
        given = self.recap.indicator_warmup_steps
        return self.training.num_training_steps // 10 if given is None else given


class BatchSizes(Section):
    """How one optimizer step's samples divide: ``total = micro * accumulation * world``."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world


def batch_sizes(training: TrainingConfig, world: int) -> BatchSizes:
    """Derive the accumulation for ``world`` ranks; UsageError where the sizes do not divide."""
    micro, steps, total = training.batch_size, training.gradient_accumulation_steps, training.global_batch_size
    if total is None:
        return BatchSizes(micro=micro, accumulation=steps or 1, world=world)
    if total % (micro * world) or (steps is not None and total != micro * steps * world):
        per_pass = micro * world * (steps or 1)
        below = max(total // per_pass, 1) * per_pass
        near = sorted({below} if steps else {below, below + per_pass})
        raise UsageError(
            f"training.global_batch_size: {total} is not batch_size {micro} x {world} ranks"
            f"{f' x {steps} accumulation steps' if steps else ' x a whole number of accumulation steps'}; "
            f"{' or '.join(map(str, near))} would be"
        )
    return BatchSizes(micro=micro, accumulation=total // (micro * world), world=world)
