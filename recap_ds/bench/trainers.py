"""The same training step three ways: under the engine, under torch's DDP, and with nothing around it.

The engine's is the training loop's own (``train.step.take_step``). The other two do what it does in plain PyTorch: same
losses, normalisers, clipping, AdamW, target critic, average, advantage ring and metrics.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed import Work
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from recap_ds.algo.advantage import AdvantageRing
from recap_ds.batch import TransitionBatch, to_device
from recap_ds.bench.phases import PhaseClock, Watched
from recap_ds.data.loader import build_train_loader
from recap_ds.distributed.linear import Linear, linear_is
from recap_ds.distributed.reduce import gather_flat, sum_over_ranks
from recap_ds.distributed.runtime import Runtime, accelerator_is_cpu
from recap_ds.models.losses import LossNormalizers, local_counts, normalizers
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.train.metrics import StepMetrics
from recap_ds.train.optim import learning_rate_factor, set_learning_rates
from recap_ds.train.session import Plan, Session
from recap_ds.train.step import append_advantages, ring_rows, take_step

Batches = Sequence[TransitionBatch]


def micro_batches(plan: Plan) -> Iterator[Batches]:
    """Step by step, this rank's, made where they are asked for: no worker fills a queue while another trainer works."""
    assert plan.config.data.num_workers == 0
    num_steps, pinned = plan.config.training.num_training_steps, not accelerator_is_cpu()
    loader = build_train_loader(
        plan.dataset, plan.config, plan.sizes, plan.info.rank, start_slot=0, num_steps=num_steps, pin_memory=pinned
    )
    flat = iter(loader)
    for _ in range(num_steps):
        yield [next(flat) for _ in range(plan.sizes.accumulation)]


class EngineTrainer:
    """``linear``: what a linear layer is in a process where DeepSpeed has built a model under stage 3."""

    def __init__(self, session: Session, linear: Linear):
        self.batches = micro_batches(session.plan)
        self.policy = session.engine.module
        self._session, self._linear = session, linear
        plan = session.plan
        self._metrics = StepMetrics(plan.config, plan.tasks, session.runtime.device)
        self._step = 0
        self._calls = [
            Watched(session.engine, "forward", "forward"),
            Watched(session.engine, "backward", "backward"),
            Watched(session.engine, "step", "optimizer"),
            Watched(Work, "wait", "communication"),
            *(Watched(shadow, "lerp", "shadows") for shadow in session.shadows.values()),
        ]

    def step(self, batches: Batches, clock: PhaseClock) -> None:
        """Collective: every rank must call."""
        with linear_is(self._linear), clock.watching(self._calls):
            take_step(self._session, self._step, batches, self._metrics, with_group_norms=False)
        self._step += 1


class PlainTrainer:
    """``shared``: under DDP with the other ranks, else this rank trains for itself and never hears of them."""

    def __init__(self, plan: Plan, runtime: Runtime, shared: bool):
        config, device = plan.config, runtime.device
        self.batches = micro_batches(plan)
        self._plan, self._device, self._shared = plan, device, shared
        self.policy = PiStarRECAPPolicy(config).to(device)
        # Float32 parameters: the engine's masters are float32 as well, and autocast is what DDP has for bf16.
        self._half = torch.autocast(device.type, torch.bfloat16, enabled=plan.precision.dtype == torch.bfloat16)
        self._ddp = None
        if shared and runtime.info.world > 1:
            self._ddp = DistributedDataParallel(self.policy, gradient_as_bucket_view=True)
        groups = self.policy.parameter_groups()
        self._rates = {group["name"]: group["lr"] for group in groups}
        self._trained = [parameter for group in groups for parameter in group["params"]]
        betas, fused = config.training.betas, not accelerator_is_cpu()
        self._optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
        keeps_average = config.training.ema_decay is not None
        self._average = [parameter.detach().clone() for parameter in self._trained] if keeps_average else []
        self._ring = AdvantageRing(len(plan.tasks), config.recap.advantage_window, device)
        self._metrics = StepMetrics(config, plan.tasks, device)
        self._step = 0

    def step(self, batches: Batches, clock: PhaseClock) -> None:
        """``shared`` - Collective: every rank must call."""
        config, rows = self._plan.config, []
        set_learning_rates(self._optimizer.param_groups, self._rates, learning_rate_factor(self._step, config.training))
        scale = self._ring.scale(config.recap.positive_fraction, config.recap.advantage_window_min)
        counts, warming_up = self._normalizers(batches), self._step < config.indicator_warmup_steps
        for number, host_batch in enumerate(batches):
            batch = to_device(host_batch, self._device)
            with self._reducing(last=number == len(batches) - 1):
                with clock.phase("forward"), self._half:
                    output = (self._ddp or self.policy)(batch, "train", scale, counts, warming_up)
                with clock.phase("backward"):
                    (output.loss / len(batches)).backward()
            output = output._replace(loss=output.loss.detach())
            self._metrics.add(batch, output)
            rows.append(ring_rows(batch, output, config.recap.demos))
        with clock.phase("optimizer"):
            clip_grad_norm_(self._trained, config.training.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._metrics.end_step(applied=True)
        with clock.phase("shadows"), torch.no_grad():
            self.policy.update_targets()
            if self._average:
                torch._foreach_lerp_(self._average, self._trained, 1.0 - config.training.ema_decay)
        flat = torch.cat(rows).flatten()
        append_advantages(self._ring, (gather_flat(flat) if self._shared else flat).view(-1, 4))
        self._step += 1

    def _reducing(self, last: bool) -> AbstractContextManager:
        """DDP reduces gradients in the backward of the last micro-batch alone."""
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def _normalizers(self, batches: Batches) -> LossNormalizers:
        counts = torch.stack([local_counts(batch) for batch in batches]).sum(dim=0)
        shares = torch.cat([counts, torch.tensor([float(len(batches))])]).to(self._device, non_blocking=True)
        total = sum_over_ranks(shares) if self._shared else shares
        return normalizers(total[:-1] / total[-1])
