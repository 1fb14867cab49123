"""IQL critics on the prefix: twin Q over the action chunk, and V. They never see the advantage indicator.

Values live in about [-1, 0] (returns divided by the task's length), where bfloat16 resolves only 0.004, so everything
from the last layer's input on is float32.

    B batch   J Q networks   T prefix tokens   H chunk   A action dims   S state dims
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recap_ds.config import ModelConfig
from recap_ds.models.layers import AttentionPool
from recap_ds.models.vlm import PrefixFeatures


class ValueOutput(nn.Linear):
    """Last layer of a value head, in float32 over whatever dtype the weights are stored in.

    Starts at -0.5 for every input, the middle of the range of values.
    """

    def __init__(self, width: int):
        super().__init__(width, 1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01 * self.in_features**-0.5)
        nn.init.constant_(self.bias, -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class PooledTrunk(nn.Module):
    """[prefix, vector] -> [B, width]: pool the prefix, join it with the vector, then a residual MLP.

    ``vector_dim`` None: from the prefix alone, whatever vector is given.
    """

    def __init__(self, config: ModelConfig, prefix_width: int, vector_dim: int | None):
        super().__init__()
        width = config.qv_hidden_size
        self.pool = AttentionPool(prefix_width, width, config.qv_num_heads)
        self.vector_in = None if vector_dim is None else nn.Linear(vector_dim, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.qv_num_layers))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.qv_num_layers))
        self.final_norm = nn.LayerNorm(width)

    def features(self, prefix: PrefixFeatures, vector: Tensor) -> Tensor:
        x = self.pool(prefix.hidden, prefix.mask)
        if self.vector_in is not None:
            x = x + self.vector_in(vector.to(self.vector_in.weight.dtype))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(functional.gelu(norm(x)))
        return self.final_norm(x)


class ValueHead(PooledTrunk):
    """[prefix, vector] -> scalar [B] float32."""

    def __init__(self, config: ModelConfig, prefix_width: int, vector_dim: int):
        super().__init__(config, prefix_width, vector_dim)
        self.output = ValueOutput(config.qv_hidden_size)

    def forward(self, prefix: PrefixFeatures, vector: Tensor) -> Tensor:
        return self.output(self.features(prefix, vector))


class QNetworks(nn.Module):
    """J independent Q(o, a[:k]) -> [J, B] float32; actions outside the window are zeroed and flagged."""

    def __init__(self, config: ModelConfig, prefix_width: int, state_dim: int, chunk_size: int, action_dim: int):
        super().__init__()
        vector_dim = state_dim + chunk_size * (action_dim + 1)
        self.heads = nn.ModuleList(ValueHead(config, prefix_width, vector_dim) for _ in range(config.num_q_networks))

    def forward(self, prefix: PrefixFeatures, state: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """state [B, S]; actions [B, H, A]; valid [B, H], True = inside the TD window."""
        shown = torch.where(valid[..., None], actions, torch.zeros_like(actions))
        vector = torch.cat([state, shown.flatten(1), valid.to(state.dtype)], dim=1)
        return torch.stack([head(prefix, vector) for head in self.heads])


class Critic(nn.Module):
    """The online critic: Q networks and V."""

    def __init__(self, config: ModelConfig, prefix_width: int, state_dim: int, chunk_size: int, action_dim: int):
        super().__init__()
        self.q = QNetworks(config, prefix_width, state_dim, chunk_size, action_dim)
        self.v = ValueHead(config, prefix_width, state_dim)
