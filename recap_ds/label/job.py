"""A label job: a critic's export and a shard folder become labels under a tag.

Every rank holds a plain replica and computes values of its share of the shards; then rank 0 alone makes labels of them.
A job that was interrupted goes on; one that finished before makes again what was damaged since, or mended, and nothing
else.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from recap_ds.batch import TransitionBatch
from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler
from recap_ds.data.label_records import LabelRecord, LabelSettings, PrecisionName, ValuesRecord, check_tag
from recap_ds.data.labels import label_problems, labels_folder, load_label_record, read_label_record, write_labels
from recap_ds.data.remote import is_remote
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.sweep import SweepDataset
from recap_ds.data.values import StoredValues, open_values, read_values, values_folder
from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import UsageError
from recap_ds.evaluate.results import open_held_out
from recap_ds.files.lock import exclusive
from recap_ds.label.assign import assign_labels
from recap_ds.label.values import Report, pending_shards, share_of_rank, write_shard_values
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.inference_value import PredictedValues, predict_values
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from recap_ds.processing.normalize import Normalizer
from recap_ds.recipe import is_among, load_config

# What may be set on the command line: with anything else the critic would see, or measure, what it never learned.
OPEN_KEYS = (
    "label.",
    "recap.positive_fraction",
    "recap.demos",
    "data.num_workers",
    "data.prefetch_batches",
    "data.max_damaged_fraction",
    "training.use_amp",
)
ASSIGN_KEYS = (
    "label.lookahead",
    "label.source",
    "label.blend",
    "label.corrections",
    "label.thresholds",
    "label.shuffle",
    "recap.positive_fraction",
    "recap.demos",
)
# Ranks with fewer samples wait for the others at the end of pass 1.
WAIT_SECONDS = 7 * 24 * 3600.0


class LabelJob(NamedTuple):
    tag: str
    policy: PiStarRECAPPolicy
    assembler: Assembler
    normalizer: Normalizer
    export: ExportRecord
    max_length: dict[str, int]  # L_task of the shards' tasks, as the critic learned it

    @property
    def config(self) -> PiStarRECAPConfig:
        return self.policy.config

    @property
    def shard_set(self) -> ShardSet:
        return self.assembler.shard_set


def check_keys(overrides: Sequence[str], keys: Sequence[str], why: str) -> None:
    for text in overrides:
        key = text.partition("=")[0]
        if not is_among(key, keys):
            raise UsageError(f"{key}: {why}; only {', '.join(keys)} can be set here")


def check_agree(labels: PiStarRECAPConfig, policy: PiStarRECAPConfig) -> None:
    """What label and policy jobs would refuse once there is a critic.

    ``labels``: the critic's configuration, as the label job reads it.
    """
    source, critic = labels.label.source, labels.value.critic
    if (source == "distributional") != (critic == "distributional"):
        raise UsageError(f"label.source={source} is not to be had from a critic of value.critic={critic}")
    if labels.recap.demos != policy.recap.demos:
        raise UsageError(f"recap.demos is {labels.recap.demos} for the labels and {policy.recap.demos} for the policy")


def open_label_job(export: Path, shards: str, tag: str, overrides: Sequence[str]) -> LabelJob:
    """Everything checked that needs no process group. UsageError where critic and shards do not fit."""
    check_tag(tag, "--tag")
    check_keys(overrides, OPEN_KEYS, "is settled by the critic")
    _check_local(shards)
    policy, contract, tokenizer = load_pretrained(export, overrides=overrides)
    if contract is None:
        raise UsageError(f"--checkpoint {export}: was saved without a contract, so its units are not known")
    if "critic" not in dict(policy.named_children()):
        raise UsageError(f"--checkpoint {export}: has no critic; take a run of stage critic or joint")
    assembler, tasks = open_held_out(policy.config, contract, tokenizer, shards)
    max_length = {name: contract.tasks[name].max_length for name in tasks}
    normalizer = Normalizer.from_dict(contract.normalizer)
    job = LabelJob(tag, policy, assembler, normalizer, ExportRecord.load(export), max_length)
    _rehearse(job)
    return job


def _rehearse(job: LabelJob) -> None:
    """Pass 2 on made-up values: whatever the shards cannot bear is said before hours of inference, not after."""
    nothing = np.zeros(job.shard_set.num_samples, np.float32)
    stored = StoredValues(_values_record(job), nothing, nothing, np.arange(len(nothing)))
    assign_labels(job.shard_set, stored, job.tag, label_settings(job.config))


def finished_labels(job: LabelJob) -> LabelRecord | None:
    """Labels that this job already made; UsageError where the tag's are of other settings or another checkpoint."""
    record = load_label_record(job.shard_set.folder, job.tag)
    if record is None:
        return None
    # Which precision this machine would take is not known yet, and does not make other labels.
    there, wanted = (values.model_dump(exclude={"precision"}) for values in (record.values, _values_record(job)))
    same_values = there == wanted
    if same_values and record.settings == label_settings(job.config):
        return record
    what = "settings" if same_values else "values (checkpoint, shards or batch size)"
    raise UsageError(
        f"--tag {job.tag}: has labels of other {what}; give another tag, or use 'recap-ds labels rethreshold' for "
        "other settings of the same values"
    )


def label_shards(job: LabelJob, runtime: Runtime, report: Report) -> LabelRecord | None:
    """Both passes, as far as they are not done; the record on rank 0, None elsewhere.

    Collective: every rank must call.
    """
    shard_set, device = job.shard_set, runtime.device
    # As in training: bfloat16 is ten times slower than float32 on a CPU.
    values = _values_record(job, "bfloat16" if job.config.training.use_amp and device.type != "cpu" else "float32")
    dataset = SweepDataset(job.assembler, job.config, job.normalizer, job.config.label.batch_size)
    with ExitStack() as held:

        def start() -> list[int] | None:
            held.enter_context(_one_job(shard_set.folder, job.tag, "--tag", report))
            return _pending(job, dataset, values, report)

        pending = on_main(runtime, start)
        if pending is not None:
            on_every_rank(runtime, lambda: _compute_values(job, runtime, dataset, values, pending, report))
        if not runtime.info.is_main:
            return None
        if pending is None:
            return load_label_record(shard_set.folder, job.tag)
        stored = read_values(shard_set, job.tag)
        _check_damage(stored, job.config.data.max_damaged_fraction, shard_set.folder, report)
        return _make_labels(shard_set, stored, job.tag, job.tag, label_settings(job.config))


def _one_job(shards: str | Path, tag: str, flag: str, report: Report) -> AbstractContextManager[None]:
    """Beside the tag's folder, which may not be there yet; no tag begins with a dot."""
    folder = labels_folder(shards, tag)
    return exclusive(folder.with_name(f".{tag}.lock"), f"{flag} {tag}", report)


def _pending(job: LabelJob, dataset: SweepDataset, values: ValuesRecord, report: Report) -> list[int] | None:
    """Shards that lack values; None where labels and values are there and whole."""
    shard_set = job.shard_set
    finished = finished_labels(job)
    if finished is not None:
        problems = label_problems(shard_set, job.tag, finished)
        # Whole values stay, in whatever precision they were computed.
        folder = open_values(shard_set.folder, finished.values_tag, finished.values)
        pending = pending_shards(dataset, shard_set, folder, finished.values)
        if not problems and not pending:
            return None
        for problem in problems:
            report(f"labels  {problem}")
        report(f"labels '{job.tag}' were finished; {len(pending)} shards' values and all labels are made again")
    folder = open_values(shard_set.folder, job.tag, values)
    return pending_shards(dataset, shard_set, folder, values)


def rethreshold(
    shards: str | Path, tag: str, new_tag: str, overrides: Sequence[str], report: Report = print
) -> LabelRecord:
    """Labels of other settings, ``new_tag``, from the values that ``tag``'s were made of; no inference."""
    check_tag(tag, "--tag")
    check_tag(new_tag, "--new-tag")
    check_keys(overrides, ASSIGN_KEYS, "does not change labels of stored values")
    _check_local(shards)
    shard_set = ShardSet.open(shards)
    old = read_label_record(shard_set, tag)
    settings = old.settings
    before = [f"label.{name}={value}" for name, value in settings.label.model_dump().items()]
    before += [f"recap.positive_fraction={settings.positive_fraction}", f"recap.demos={settings.demos}"]
    config = load_config(None, [*before, *overrides])
    stored = read_values(shard_set, old.values_tag)
    if stored.record != old.values:
        raise UsageError(
            f"--tag {tag}: its labels were made of other values than values/{old.values_tag} holds now; "
            "run launch/label.py with the critic you mean, under a tag of its own"
        )
    with _one_job(shards, new_tag, "--new-tag", report):
        if load_label_record(shards, new_tag) is not None:
            raise UsageError(f"--new-tag {new_tag}: there are labels of that tag already; give another")
        return _make_labels(shard_set, stored, old.values_tag, new_tag, label_settings(config))


def _check_local(shards: str | Path) -> None:
    if is_remote(str(shards)):
        raise UsageError(
            f"{shards}: labels are written beside the shards, and these are remote; label a local copy, and upload its "
            "folder labels/"
        )


def _make_labels(
    shard_set: ShardSet, stored: StoredValues, values_tag: str, tag: str, settings: LabelSettings
) -> LabelRecord:
    record, columns = assign_labels(shard_set, stored, values_tag, settings)
    return write_labels(shard_set, tag, record, columns)


def _check_damage(stored: StoredValues, limit: float, folder: Path, report: Report) -> None:
    num_damaged = int(np.isnan(stored.value).sum())
    if num_damaged > limit * len(stored.value):
        raise UsageError(
            f"{folder}: {num_damaged} of {len(stored.value)} samples could not be read, more than "
            f"data.max_damaged_fraction={limit:g} allows; see 'recap-ds shards verify {folder}'"
        )
    if num_damaged:
        report(f"{num_damaged} samples could not be read and get no label; see 'recap-ds shards verify {folder}'")


def label_settings(config: PiStarRECAPConfig) -> LabelSettings:
    return LabelSettings(label=config.label, positive_fraction=config.recap.positive_fraction, demos=config.recap.demos)


def _compute_values(
    job: LabelJob, runtime: Runtime, dataset: SweepDataset, values: ValuesRecord, pending: list[int], report: Report
) -> None:
    device, info, shard_set = runtime.device, runtime.info, job.shard_set
    if device.type == "cpu":
        # A sum split over threads rounds by their number, which falls as ranks are added.
        torch.set_num_threads(1)
    policy = job.policy.to(device, getattr(torch, values.precision)).eval()

    def predict(batch: TransitionBatch) -> PredictedValues:
        return predict_values(policy, batch.observation, batch.actions, batch.td_action_valid)

    mine, folder = share_of_rank(shard_set, pending, info.rank, info.world), values_folder(shard_set.folder, job.tag)
    write_shard_values(dataset, shard_set, mine, folder, values, predict, job.config, device, report)


def _values_record(job: LabelJob, precision: PrecisionName = "float32") -> ValuesRecord:
    config, source = job.config, job.export.provenance
    return ValuesRecord(
        checkpoint_hash=job.export.content_hash(),
        checkpoint_run=source.run,
        checkpoint_step=source.step,
        manifest_hash=job.shard_set.manifest.content_hash(),
        precision=precision,
        batch_size=config.label.batch_size,
        value=config.value,
        max_length=job.max_length,
    )
