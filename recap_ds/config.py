"""Every knob of recap_ds, typed, frozen and with one owner.

Defaults < recipe YAML < ``section.key=value``; reading those is ``recipe.py``'s work. DeepSpeed's JSON owns sharding,
offload, precision and communication, and nothing that stands here (``distributed/ds_config.py`` refuses it).
Lengths of time are native frames or optimizer steps, spelled in the name; learning rates are peaks.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recap_ds.errors import UsageError

SOURCES = ("demo", "auto", "intervention")
SourceName = Literal["demo", "auto", "intervention"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    # validate_default: a default that breaks its own rule is our bug and should fail at once.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """Sizes of the vision-language model (VLM), the action expert and the critics."""

    # A hub id, a folder in transformers' format, or "tiny": a random PaliGemma of a million parameters, no download.
    vlm_model_name: str = "google/paligemma-3b-pt-224"
    vlm_revision: str | None = None
    # Take the architecture (and tokenizer) from vlm_model_name but random weights.
    vlm_random_init: bool = False
    freeze_vlm: bool = True
    image_size: int = Field(224, ge=16)
    max_prompt_tokens: int = Field(48, ge=1)
    # Tiny VLM only: four strided convolutions in place of the patch projection; trains far faster from scratch.
    conv_stem: bool = False

    action_expert: Literal["dit_cross"] = "dit_cross"
    action_expert_hidden_size: int = Field(1024, ge=8)
    action_expert_num_layers: int = Field(6, ge=1)
    action_expert_num_heads: int = Field(8, ge=1)
    action_expert_mlp_ratio: float = Field(4.0, gt=0)
    action_expert_dropout: float = Field(0.0, ge=0, lt=1)
    # Draws of (time, noise) per observation: the prefix is encoded once and shared by all of them.
    flow_samples: int = Field(1, ge=1)

    qv_hidden_size: int = Field(512, ge=8)
    qv_num_layers: int = Field(3, ge=1)
    qv_num_heads: int = Field(8, ge=1)
    num_q_networks: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self):
        for width, heads, names in (
            (self.action_expert_hidden_size, self.action_expert_num_heads, "action_expert_{hidden_size,num_heads}"),
            (self.qv_hidden_size, self.qv_num_heads, "qv_{hidden_size,num_heads}"),
        ):
            if width % heads or (width // heads) % 2:
                raise ValueError(f"model.{names}: {width} does not divide into {heads} heads of even width")
        return self


class LoraConfig(Section):
    """Low-rank adapters on the VLM's language model (peft). Needs ``model.freeze_vlm: true``."""

    enabled: bool = False
    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class IQLConfig(Section):
    """Implicit Q-learning (arXiv 2110.06169) over action chunks."""

    # Per CHUNK of chunk_size frames; per frame it is discount ** (1 / chunk_size).
    discount: float = Field(0.99, gt=0, le=1)
    expectile: float = Field(0.7, gt=0.5, lt=1)
    # Weighted extraction: weight = exp(A / (temperature * sigma_task)), at most 100.
    temperature: float = Field(0.5, gt=0)
    v_loss_weight: float = Field(1.0, gt=0)
    q_loss_weight: float = Field(1.0, gt=0)
    policy_loss_weight: float = Field(1.0, gt=0)
    # Polyak rate of the target critic, per optimizer step.
    target_update_rate: float = Field(0.005, gt=0, le=1)
    # The TD window is fixed when shards are written; "manifest" accepts one that differs from chunk_size.
    horizon: Literal["chunk_size", "manifest"] = "chunk_size"


class ValueConfig(Section):
    """Rewards and returns (RECAP, arXiv 2511.14759, Eq. 5). Lengths are in frames of the native rate."""

    reward: Literal["sparse_time", "environment"] = "sparse_time"
    # Penalty of a failed ending, in frames; None is the task's longest episode.
    c_fail: float | None = Field(None, ge=0)
    normaliser: Literal["max_length", "max_length_plus_c_fail"] = "max_length"
    timeout_is: Literal["failure", "truncated"] = "failure"
    # Overrides of the longest episode per task; the rest come from the shard manifest.
    max_length: dict[str, int] = Field(default_factory=dict)


class RecapConfig(Section):
    """Advantage conditioning: who counts as positive, and how the policy uses it."""

    # Policy-loss weight per source; sampling is data.mixture's business.
    demo_weight: float = Field(1.0, ge=0)
    auto_weight: float = Field(1.0, ge=0)
    intervention_weight: float = Field(2.0, ge=0)
    demos: Literal["positive", "labelled"] = "positive"
    positive_fraction: float = Field(0.4, gt=0, lt=1)
    indicator_dropout: float = Field(0.3, ge=0, lt=1)
    # Steps in which not-forced samples train without an indicator; None is a tenth of the run.
    indicator_warmup_steps: int | None = Field(None, ge=0)
    policy_extraction: Literal["conditioned", "weighted", "both"] = "conditioned"
    # Advantages remembered per task for thresholds and sigma, and how many are needed before they count.
    advantage_window: int = Field(8192, ge=16)
    advantage_window_min: int = Field(512, ge=2)

    @property
    def source_weights(self) -> tuple[float, float, float]:
        return self.demo_weight, self.auto_weight, self.intervention_weight


class TrainingConfig(Section):
    stage: Literal["joint"] = "joint"
    # Micro-batch of one rank. Global batch = batch_size x gradient_accumulation_steps x world size.
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    global_batch_size: int | None = Field(None, ge=1)
    num_training_steps: int = Field(100_000, ge=1)
    num_warmup_steps: int = Field(1000, ge=0)
    learning_rate: float = Field(1e-4, gt=0)  # action expert
    vlm_learning_rate: float = Field(1e-5, gt=0)
    critic_learning_rate: float = Field(3e-4, gt=0)
    # The cosine ends at this share of the peak.
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    use_amp: bool = True
    activation_checkpointing: bool = False
    # Exponential moving average used by evaluation and export; None keeps none.
    ema_decay: float | None = Field(0.999, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)
    resume: Literal["auto", "never"] = "auto"
    # Optimizer steps in a row that may be skipped for NaN or inf before the run stops.
    max_skipped_steps: int = Field(10, ge=1)


class DataConfig(Section):
    # A folder with manifest.json. None only in the embedded quickstart, which makes its own.
    shards: str | None = None
    # Sampling weight per source; None draws every sample equally often.
    mixture: dict[SourceName, float] | None = None
    # Camera names in slot order; None takes the manifest's. A camera a sample lacks is masked.
    cameras: tuple[str, ...] | None = None
    normalization: Literal["mean_std", "quantile"] = "mean_std"
    # Samples are shuffled within windows of this many shards.
    shuffle_shards: int = Field(8, ge=1)
    # Share of each task's episodes kept for evaluation, chosen by a hash of the episode's name.
    held_out_fraction: float = Field(0.1, ge=0, lt=1)
    augmentation: Literal["none", "shift_and_color"] = "none"
    num_workers: int = Field(2, ge=0)
    prefetch_batches: int = Field(4, ge=1)
    max_damaged_fraction: float = Field(0.001, ge=0, le=1)


class CheckpointConfig(Section):
    save_every_steps: int = Field(1000, ge=1)
    keep_last: int = Field(2, ge=1)
    # Also keep every checkpoint whose step is a multiple of this.
    keep_every_steps: int | None = Field(None, ge=1)
    # Beside ours, a native ZeRO checkpoint on which zero_to_fp32.py works.
    also_deepspeed: bool = False


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1)
    # auto: online where wandb has an account, else offline.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "recap_ds"
    wandb_entity: str | None = None


class EvaluationConfig(Section):
    # Held-out evaluation during training; the last step is always evaluated.
    every_steps: int = Field(1000, ge=1)
    max_samples: int = Field(512, ge=1)
    batch_size: int = Field(32, ge=1)
    # Flow times of the seeded grid, evenly spaced in (0, 1).
    num_flow_times: int = Field(4, ge=1)


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
        if self.model.conv_stem and self.model.vlm_model_name != "tiny":
            raise ValueError("model.conv_stem: only the tiny VLM has one")
        if self.data.mixture is not None and not any(weight > 0 for weight in self.data.mixture.values()):
            raise ValueError("data.mixture: no source has a positive weight")
        return self

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
