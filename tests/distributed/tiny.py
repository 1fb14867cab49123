"""Small models and configs shared by the workers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.distributed.build import sharded_build
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.distributed.engine import build_engine, step_was_applied, zero_stale_gradients
from tests.distributed.harness import REPOSITORY

WIDTH = 16


def ds_config(name: str, world: int, *, bf16: bool = False, accumulation: int = 1, **zero: Any) -> dict[str, Any]:
    """A shipped config, resolved for a CPU; ``zero`` overrides its zero_optimization."""
    raw = load_ds_config(REPOSITORY / "ds_configs" / f"{name}.json")
    raw["bf16"] = {"enabled": bf16}
    raw["zero_optimization"] |= zero
    sizes = BatchSizes(micro=4, accumulation=accumulation, world=world)
    config = PiStarRECAPConfig(training={"max_grad_norm": 1e9})
    return resolve_ds_config(raw, config, sizes, on_cpu=True)[0]


class Features(NamedTuple):
    hidden: Tensor  # [B, WIDTH]
    scale: Tensor  # [B]


class Inputs(NamedTuple):
    inner: Features
    target: Tensor  # [B]


class Outputs(NamedTuple):
    loss: Tensor
    features: Features


class Trunk(nn.Module):
    """Two layers, the first frozen; optionally recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)

    def _layers(self, hidden: Tensor) -> Tensor:
        return hidden + self.adapter(torch.tanh(self.frozen(hidden)))

    def forward(self, features: Features, checkpointing: bool) -> Features:
        if checkpointing:
            hidden = torch.utils.checkpoint.checkpoint(self._layers, features.hidden, use_reentrant=False)
        else:
            hidden = self._layers(features.hidden)
        return Features(hidden, features.scale)


class Container(nn.Module):
    """A trunk run twice (once without gradient), a head, a critic on detached features and its frozen target."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Linear(WIDTH, 1)
        self.critic = nn.Linear(WIDTH, 3)
        self.target_critic = nn.Linear(WIDTH, 3)
        self.target_critic.requires_grad_(False)

    def forward(self, inputs: Inputs, checkpointing: bool = False) -> Outputs:
        with torch.no_grad():
            bootstrap = self.target_critic(self.trunk(inputs.inner, False).hidden).amin(-1)
        features = self.trunk(inputs.inner, checkpointing)
        policy = ((self.head(features.hidden)[:, 0] - inputs.target) * features.scale).square().mean()
        values = self.critic(features.hidden.detach())
        value = (values - 0.5 * bootstrap[:, None] - inputs.target[:, None]).square().mean()
        return Outputs((policy + value).float(), features)


def inputs(seed: int, batch: int, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, WIDTH, generator=generator).to(dtype)
    scale, target = torch.rand(2, batch, generator=generator).to(dtype).unbind()
    return Inputs(Features(hidden, scale), target)


def rank_slice(nest: Any, rank: int, world: int) -> Any:
    """This rank's part of a batch of nested NamedTuples."""
    if isinstance(nest, Tensor):
        return nest.chunk(world)[rank]
    return type(nest)(*(rank_slice(part, rank, world) for part in nest))


def build(ds: dict[str, Any], seed: int = 0, lr: float = 1e-2) -> Any:
    """An engine around a Container, in two optimizer groups."""
    torch.manual_seed(seed)
    with sharded_build(ds):
        model = Container()
    policy = [*model.trunk.adapter.parameters(), *model.head.parameters()]
    groups = [
        {"name": "policy", "params": policy, "lr": lr, "weight_decay": 0.0},
        {"name": "critic", "params": list(model.critic.parameters()), "lr": 0.3 * lr, "weight_decay": 0.1},
    ]
    return build_engine(model, groups, ds)


def step(engine: Any, batch: Inputs, **kwargs: Any) -> bool:
    """One micro-batch and the step after it; whether it was applied."""
    outputs = engine(batch, **kwargs)
    engine.backward(outputs.loss)
    engine.step()
    zero_stale_gradients(engine)
    return step_was_applied(engine)
