"""One forward and backward of a stage at its true size on the meta device: what it holds, computes and visits.

The policy is the one that trains, built by the same code with shapes for parameters; nothing is drawn, read or
downloaded, and no process group is needed. The same measurement runs on real tensors, which is how it is tested.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import TransitionBatch, map_tensors
from recap_ds.config import PiStarRECAPConfig
from recap_ds.models.building import MetaBuilder
from recap_ds.models.losses import LossNormalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.plan.blank import blank_batch, blank_normalizers, blank_scale
from recap_ds.plan.meter import SavedTensors, StepMeter, fused_attention


class StepMeasure(NamedTuple):
    """Of one micro-batch on one rank."""

    saved_bytes: int  # kept by autograd between forward and backward
    peak_bytes: int  # the most alive at once beyond parameters, with temporaries and the gradient being made
    flops: int  # forward and backward as they run, recomputation included
    # The parameters each module owns, by their place in the policy's order, as forward and backward come to them.
    visits: list[tuple[int, ...]]


def build_on_meta(config: PiStarRECAPConfig, dtype: torch.dtype, vlm_folder: str | None) -> PiStarRECAPPolicy:
    """``vlm_folder``: where the VLM's config.json is; its weights need not be there. None for the tiny VLM."""
    builder = MetaBuilder(dtype)
    with builder.context():  # around all of it: adapters are added after the VLM was built
        policy = PiStarRECAPPolicy(config, builder, vlm_folder)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in policy.parameters())
    return policy


def measure_on_meta(
    policy: PiStarRECAPPolicy, num_cameras: int, linear: AbstractContextManager | None = None
) -> StepMeasure:
    """``linear``: a context that makes linear layers those of the engine (``distributed.linear``)."""
    batch = blank_batch(policy.config, policy.config.training.batch_size, num_cameras)
    with fused_attention(), linear or nullcontext():
        return measure_step(policy, batch, blank_scale(), blank_normalizers())


def count_model_flops(config: PiStarRECAPConfig, dtype: torch.dtype, vlm_folder: str | None, num_cameras: int) -> int:
    """Operations of one micro-batch that training needs: recomputation is none of them."""
    training = config.training.model_copy(update={"activation_checkpointing": False})
    policy = build_on_meta(config.model_copy(update={"training": training}), dtype, vlm_folder)
    return measure_on_meta(policy, num_cameras).flops


def measure_evaluation_on_meta(policy: PiStarRECAPPolicy, batch_size: int, num_cameras: int) -> int:
    """Bytes alive at once in the held-out evaluation of one batch, parameters apart."""
    batch = blank_batch(policy.config, batch_size, num_cameras)
    meter = StepMeter(outside=policy.parameters())
    map_tensors(meter.add, batch)
    with fused_attention(), meter:
        policy(batch, "evaluate", blank_scale(), blank_normalizers(), warming_up=False)
    return meter.peak_bytes


def measure_step(
    policy: PiStarRECAPPolicy, batch: TransitionBatch, scale: AdvantageScale, normalizers: LossNormalizers
) -> StepMeasure:
    """Wherever the tensors are. Gradients are let go of as soon as they are whole, as the engine does it."""
    policy.train()
    parameters = list(policy.parameters())
    saved, meter = SavedTensors(outside=parameters), StepMeter(outside=parameters)
    map_tensors(meter.add, batch)
    with ExitStack() as stack:
        visits = stack.enter_context(_watch_visits(policy))
        stack.enter_context(_gradients_leave(parameters))
        stack.enter_context(meter)
        with saved.watch():
            loss = policy(batch, "train", scale, normalizers, warming_up=False).loss
        saved_bytes = saved.num_bytes
        loss.backward()
    return StepMeasure(saved_bytes, meter.peak_bytes, meter.flops, visits)


@contextmanager
def _gradients_leave(parameters: list[Parameter]) -> Iterator[None]:
    def leave(parameter: Parameter) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(leave) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_visits(policy: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Every time that a module with parameters of its own begins a forward or a backward."""
    visits: list[tuple[int, ...]] = []
    places = {parameter: place for place, parameter in enumerate(policy.parameters())}
    handles = []

    def watch_backward(output: object, owned: tuple[int, ...]) -> None:
        differentiable = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if differentiable:
            differentiable[0].register_hook(lambda _: visits.append(owned))

    for module in policy.modules():
        owned = tuple(places[parameter] for parameter in module.parameters(recurse=False))
        if owned:
            handles.append(module.register_forward_pre_hook(lambda *_, owned=owned: visits.append(owned)))
            handles.append(module.register_forward_hook(lambda *seen, owned=owned: watch_backward(seen[-1], owned)))

    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()
