"""Load and save exports: the policy, what it must agree on with a robot, and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.export_tokenizer import load_tokenizer
from recap_ds.models.export_weights import load_export, locate_export, save_export
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.tokens import Tokenizer


class Pretrained(NamedTuple):
    policy: PiStarRECAPPolicy  # on the CPU, float32, in eval mode
    contract: RobotContract | None  # None only where a policy was saved that had never seen data
    tokenizer: Tokenizer


def load_pretrained(export: str | Path, overrides: Sequence[str] = (), revision: str | None = None) -> Pretrained:
    """An export folder, or the hub id of one and its ``revision`` (a branch, tag or commit).

    ``overrides`` (section.key=value) change settings, not weights.

    Raises UsageError where the export is damaged, incomplete or of another format.
    """
    folder = locate_export(export, revision)
    policy = load_export(PiStarRECAPPolicy, folder, overrides)
    return Pretrained(policy, policy.contract, load_tokenizer(folder, policy.config))


def acting_dtype(config: PiStarRECAPConfig, device: torch.device) -> torch.dtype:
    """The precision of training; on a CPU float32, as bfloat16 is ten times slower there."""
    return torch.bfloat16 if config.training.use_amp and device.type != "cpu" else torch.float32


def save_pretrained(
    policy: PiStarRECAPPolicy, contract: RobotContract | None, folder: str | Path, *, overwrite: bool = False
) -> ExportRecord:
    """Write a policy in memory (not one inside an engine: consolidate its checkpoint) as an export, in float32."""
    policy.contract = contract
    return save_export(policy, folder, overwrite=overwrite)
