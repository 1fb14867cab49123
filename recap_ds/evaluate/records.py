"""Held-out evaluation, first half: run the model over every rank's batches and bring the per-sample results together.

``forward`` is an engine (during training) or a plain replica of an export; this file cannot tell.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.batch import TransitionBatch, to_device
from recap_ds.distributed.reduce import gather_flat
from recap_ds.models.losses import EvaluationOutput

Forward = Callable[[TransitionBatch], EvaluationOutput]


class Records(NamedTuple):
    """Per-sample results of all ranks, padding removed; None where the stage has no such thing.

    N samples   H chunk   A action dims
    """

    task: np.ndarray  # [N] int
    source: np.ndarray  # [N] int
    control: np.ndarray  # [N] int
    outcome: np.ndarray  # [N] int
    mc_return: np.ndarray  # [N]
    mc_valid: np.ndarray  # [N] bool
    td_valid: np.ndarray  # [N] bool
    q_loss: np.ndarray | None  # [N]
    v_loss: np.ndarray | None  # [N]; of a distributional critic, negative log-likelihood
    q: np.ndarray | None  # [N]
    v: np.ndarray | None  # [N]
    v_shuffled: np.ndarray | None  # [N], NaN where the sample that was to lend its images cannot be read
    flow_loss: np.ndarray | None  # [N, 3], by INDICATOR_IDS
    actions: np.ndarray | None  # [N, H, A], sampled with the positive indicator, normalised
    unconditioned_actions: np.ndarray | None  # [N, H, A]
    true_actions: np.ndarray  # [N, H, A]
    action_mask: np.ndarray  # [N, H, A] bool, True = a valid frame and a real dim


@torch.no_grad()
def collect_records(forward: Forward, batches: Iterable[TransitionBatch], device: torch.device) -> Records:
    """Collective: every rank must call, with the same number of batches."""
    columns: list[dict[str, Tensor]] = []
    valid: list[Tensor] = []
    for host_batch in batches:
        batch = to_device(host_batch, device)
        row = _columns(batch, forward(batch))._asdict()
        columns.append({name: column.double() for name, column in row.items() if column is not None})
        valid.append(batch.sample_valid)
    keep = gather_flat(torch.cat(valid)).cpu().numpy()
    gathered: dict[str, np.ndarray | None] = dict.fromkeys(Records._fields)
    for name in columns[0]:
        local = torch.cat([part[name] for part in columns])
        whole = gather_flat(local.flatten()).view(-1, *local.shape[1:])
        gathered[name] = whole.cpu().numpy()[keep]
    records = Records(**gathered)
    integers = {name: getattr(records, name).astype(np.int64) for name in ("task", "source", "control", "outcome")}
    masks = {name: getattr(records, name).astype(bool) for name in ("mc_valid", "td_valid", "action_mask")}
    return records._replace(**integers, **masks)


def _columns(batch: TransitionBatch, output: EvaluationOutput) -> Records:
    """This micro-batch's rows, as tensors in the order of ``Records``."""
    v_shuffled = output.v_shuffled
    if v_shuffled is not None:
        v_shuffled = torch.where(batch.replaced[batch.image_lender], torch.nan, v_shuffled)
    return Records(
        task=batch.task,
        source=batch.source,
        control=batch.control,
        outcome=batch.outcome,
        mc_return=batch.mc_return,
        mc_valid=batch.mc_valid,
        td_valid=batch.td_valid,
        q_loss=output.q_loss,
        v_loss=output.v_loss,
        q=output.q,
        v=output.v,
        v_shuffled=v_shuffled,
        flow_loss=output.flow_loss,
        actions=output.actions,
        unconditioned_actions=output.unconditioned_actions,
        true_actions=batch.actions,
        action_mask=batch.action_valid[:, :, None] & batch.action_dim_mask[:, None, :],
    )
