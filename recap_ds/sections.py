"""The sections of training's configuration: every knob, typed and frozen, with the default it has.

Those of other jobs stand in ``job_sections.py``, rules between sections in ``config.py``, from which the rest of the
package imports. Lengths of time are native
frames or optimizer steps, spelled in the name; learning rates are peaks.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

SOURCES = ("demo", "auto", "intervention")
SourceName = Literal["demo", "auto", "intervention"]
Beta = Annotated[float, Field(ge=0, lt=1)]
# A source, or one data set of it: "demo", "demo/NAME".
PartName = Annotated[str, Field(pattern=r"^(demo|auto|intervention)(/.+)?$")]
Weights = dict[PartName, Annotated[float, Field(ge=0)]]


class VlmSource(NamedTuple):
    """Where a run's VLM is read from, and the key that says so, for messages."""

    key: str
    name: str
    revision: str | None
    random_init: bool  # True = the architecture (and tokenizer) alone


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

    # dit_cross: a transformer of its own size that cross-attends to the VLM's last features. pi_joint: the Gemma expert
    # of pi0 and pi0.5, which attends to every layer of the VLM, so action_expert_num_{layers,heads} are the VLM's.
    action_expert: Literal["dit_cross", "pi_joint"] = "dit_cross"
    # Of pi_joint. pi05: flow time modulates the norms; the expert is not shown the state (pi0.5 has it in the prompt).
    # pi0: flow time is mixed into the actions, the state is a token.
    pi_version: Literal["pi05", "pi0"] = "pi05"
    # How the action expert is told the advantage. embedding: a learned vector, added to flow time's. text, of pi_joint:
    # the words "Advantage: positive" after the prompt, which the expert sees and the prompt and the images do not.
    advantage_conditioning: Literal["embedding", "text"] = "embedding"
    action_expert_hidden_size: int = Field(1024, ge=8)
    action_expert_num_layers: int = Field(6, ge=1)
    action_expert_num_heads: int = Field(8, ge=1)
    action_expert_mlp_ratio: float = Field(4.0, gt=0)
    action_expert_dropout: float = Field(0.0, ge=0, lt=1)
    # Draws of (time, noise) per observation: the prefix is encoded once and shared by all of them.
    flow_samples: int = Field(1, ge=1)
    # The action expert only reads the VLM. In stage joint the critics then train it, if it is not frozen and no action
    # tokens do.
    stop_gradient: bool = False

    # Of pi_joint. Above 0 the VLM also learns to predict the chunk's actions as tokens behind the prefix, which neither
    # the prefix nor the expert sees: with stop_gradient, pi0.5's knowledge insulation. Only in training: nobody acts by
    # them. 0: nothing is built. Needs a VLM that trains and data.normalization quantile.
    action_token_weight: float = Field(0.0, ge=0)
    # binned: a token per value, as many bins over [-1, 1] as action_vocabulary says. Or the folder of a FAST tokenizer,
    # or its hub id where it is in the cache (physical-intelligence/fast).
    action_tokenizer: str = "binned"
    # Entries of the VLM's vocabulary that tokens take, counted from its end; of a FAST tokenizer, its vocab_size.
    action_vocabulary: int = Field(256, ge=2)
    # Tokens of a chunk: binned leaves out frames, evenly, so that it fits; FAST leaves out the finest of its detail.
    max_action_tokens: int = Field(128, ge=1)

    qv_hidden_size: int = Field(512, ge=8)
    qv_num_layers: int = Field(3, ge=1)
    qv_num_heads: int = Field(8, ge=1)
    num_q_networks: int = Field(2, ge=1)

    @property
    def vlm_source(self) -> VlmSource:
        return VlmSource("model.vlm_model_name", self.vlm_model_name, self.vlm_revision, self.vlm_random_init)

    @model_validator(mode="after")
    def _heads_divide(self):
        # A joint expert's heads have the width of the VLM's, whatever its own is.
        expert_heads = self.action_expert_num_heads if self.action_expert == "dit_cross" else 1
        for width, heads, names in (
            (self.action_expert_hidden_size, expert_heads, "action_expert_{hidden_size,num_heads}"),
            (self.qv_hidden_size, self.qv_num_heads, "qv_{hidden_size,num_heads}"),
        ):
            if width % heads or (width // heads) % 2:
                raise ValueError(f"model.{names}: {width} does not divide into {heads} heads of even width")
        if self.action_expert == "pi_joint" and self.action_expert_dropout > 0:
            raise ValueError("model.action_expert_dropout: pi_joint has none, as its published weights; set 0")
        if self.action_expert == "dit_cross" and self.advantage_conditioning == "text":
            raise ValueError(
                "model.advantage_conditioning: text is read in the VLM's layers, to which dit_cross does not attend; "
                "set embedding, or model.action_expert=pi_joint"
            )
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
    """Rewards, returns and what learns them (RECAP, arXiv 2511.14759, Eq. 1 and 5). Lengths are native frames."""

    # iql: twin Q over action chunks and V, by TD. distributional: bins over the Monte-Carlo return; stage critic only.
    critic: Literal["iql", "distributional"] = "iql"
    # shared: the critic sees through the VLM of model.*. own: stage critic builds the model of value.vlm_model_name in
    # its place, a hub id or folder of any image-text-to-text model of transformers whose image path takes pixels
    # alone; what else model.* and lora.* say of the VLM (freeze_vlm, image_size, vlm_random_init, ...) holds for it.
    backbone: Literal["shared", "own"] = "shared"
    vlm_model_name: str | None = None
    vlm_revision: str | None = None
    num_bins: int = Field(201, ge=2)
    target: Literal["two_hot", "hl_gauss"] = "two_hot"
    # false: a distributional critic judges by images and prompt alone. On small data sets the robot's own state gives
    # away how long an episode has gone on, and a critic that reads it hardly looks at the images.
    reads_state: bool = True
    reward: Literal["sparse_time", "environment"] = "sparse_time"
    # Penalty of a failed ending, in frames; None is the task's longest episode.
    c_fail: float | None = Field(None, ge=0)
    normaliser: Literal["max_length", "max_length_plus_c_fail"] = "max_length"
    timeout_is: Literal["failure", "truncated"] = "failure"
    # Charged where a human takes over, in units of the task's longest episode.
    takeover_penalty: float = Field(0.0, ge=0)
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
    # Stage policy without labels: every sample is positive, whoever acted (the paper's supervised fine-tuning).
    sft: bool = False
    # Advantages remembered per task for thresholds and sigma, and how many are needed before they count.
    advantage_window: int = Field(8192, ge=16)
    advantage_window_min: int = Field(512, ge=2)

    @property
    def source_weights(self) -> tuple[float, float, float]:
        return self.demo_weight, self.auto_weight, self.intervention_weight


class TrainingConfig(Section):
    # joint: policy and IQL critics at once. critic, then labels (launch/label.py), then policy: RECAP's own order.
    stage: Literal["joint", "critic", "policy"] = "joint"
    # An export, a run or one of its checkpoints whose weights this run begins with: its VLM, and every head that both
    # have. None begins with the VLM of model.vlm_model_name.
    start_from: str | None = None
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
    # A loss spike is a step whose loss is above the median of the last spike_window_steps by more than spike_deviations
    # robust standard deviations. skip: such a step changes no weight, and spike_max_in_a_row of them end the run.
    # rollback: as many instead take it back to the checkpoint before them, to go on behind their samples.
    spike_action: Literal["none", "skip", "rollback"] = "none"
    spike_deviations: float = Field(10.0, gt=0)
    spike_window_steps: int = Field(200, ge=10)
    spike_max_in_a_row: int = Field(5, ge=1)
    spike_max_rollbacks: int = Field(3, ge=1)
    # From the start of the process; then the run saves and exits with code 75, as at a signal. None: no limit.
    max_wall_minutes: float | None = Field(None, gt=0)
    # So long without a step, an evaluated batch or a save, and every rank writes its stacks to runs/NAME/failures and
    # the job ends. Longer than the longest of these ever takes, the first batch and the download of weights too.
    hang_timeout_seconds: float | None = Field(1800.0, gt=0)
    # Stop when evaluation.gate has not improved for so many evaluations; None trains to the end.
    early_stop_evaluations: int | None = Field(None, ge=1)


class DataConfig(Section):
    # A folder with manifest.json, or the address of one: http(s)://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH,
    # hf://datasets/OWNER/NAME[@REVISION][/PATH], or pipe:COMMAND, which prints the file {name}. None only in the
    # embedded quickstart, which makes its own.
    shards: str | None = None
    # Remote shards are kept whole on every node, in this folder (None: ~/.cache/recap_ds), the last used ones that fit.
    # Room for fewer than shuffle_shards of each source would have them fetched again for every few samples.
    cache_folder: str | None = None
    max_cache_gib: float = Field(100.0, gt=0, le=1e9)
    # A shard that cannot be fetched is tried again for so long, then the run ends. Less than
    # training.hang_timeout_seconds.
    fetch_patience_seconds: float = Field(600.0, ge=0)
    # Read shards from end to end in a random order instead of keeping them, for sets that no disk holds: which sample
    # fills a slot is then left to chance. Every worker mixes stream_pool_samples of each source or data set.
    streaming: bool = False
    stream_pool_samples: int = Field(1024, ge=1)
    # Stage policy: the tag under which launch/label.py wrote the labels it is to learn from.
    labels: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    # Sampling weight of a source ("demo") or of one data set of it ("demo/NAME", of the episodes "NAME/<index>"); a
    # source's own weight is for those of its data sets that stand not beside it. None draws every sample equally often.
    mixture: Weights | None = None
    # Optimizer step -> the weights from there on.
    mixture_schedule: dict[Annotated[int, Field(ge=1)], Weights] = Field(default_factory=dict)
    # Which autonomous episodes are learned from. successful: filtered imitation, beside demonstrations and corrections.
    auto_episodes: Literal["all", "successful"] = "all"
    # Epochs of a source or data set at most; its share then goes to the others. At least one has to go without.
    max_epochs: dict[PartName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    # Above 1, the global batch and the shards of every source are divided into so many lanes, and a node whose ranks
    # hold whole lanes reads the shards of these only. The order of samples depends on it. For nodes that cannot each
    # keep all shards; as many as there are nodes.
    lanes: int = Field(1, ge=1)
    # Camera names in slot order; None takes the manifest's. A camera a sample lacks is masked.
    cameras: tuple[str, ...] | None = None
    # In their place: slots by the names that published weights have for them, each with the data's camera that fills
    # it, or null: its image is blank and masked. pi0 and pi0.5 have base_0_rgb, left_wrist_0_rgb and right_wrist_0_rgb,
    # in this order.
    camera_slots: dict[str, str | None] | None = None
    # mean_std: mean 0 and deviation 1. quantile: q01 and q99 become -1 and 1, as in pi0.5.
    normalization: Literal["mean_std", "quantile"] = "mean_std"
    # plain: the task's prompt alone. pi05: "Task: PROMPT, State: 128 3 255;" and "Action: ", as pi0.5 reads it, with
    # the robot's state in 256 bins over [-1, 1]: needs normalization quantile, and longer model.max_prompt_tokens.
    prompt_format: Literal["plain", "pi05"] = "plain"
    # Samples are shuffled within windows of this many shards.
    shuffle_shards: int = Field(8, ge=1)
    # Share of each task's episodes kept for evaluation, chosen by a hash of the episode's name; above 0, at least one
    # of a task that has two.
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
    # Write in a thread while training goes on, which then stands still for a copy only. The copy takes host memory: 12
    # bytes per trainable parameter and 4 more with an average, shared out over the ranks. The last save, one before a
    # stop and the best so far are waited for, as is all that also_deepspeed writes.
    background: bool = False
    # A save that fails (a full disk) is tried again at the next one; as many in a row end the run.
    max_failed_saves: int = Field(3, ge=1)


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1)
    # Matrix products per second of one device, for train/mfu. None goes by the device's name; a device that is not
    # known (recap_ds/plan/hardware.py), a CPU among them, has no such figure.
    peak_tflops: float | None = Field(None, gt=0)
    # auto: online where wandb has an account, else offline.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "recap_ds"
    wandb_entity: str | None = None
