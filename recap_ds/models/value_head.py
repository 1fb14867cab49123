"""Distributional critic: V(o) as a distribution over bins on [-1, 0] (RECAP, arXiv 2511.14759, section IV-A).

The same trunk as the IQL critics'. Everything from the last layer's input on is float32: the paper's bins are 0.005
apart, which bfloat16 cannot tell apart near -1.

    B batch   S state dims
"""

from torch import Tensor, nn
from torch.nn import functional

from recap_ds.config import ModelConfig
from recap_ds.models.critics import PooledTrunk
from recap_ds.models.vlm import PrefixFeatures


class BinsOutput(nn.Linear):
    """Logits of the bins, in float32 over whatever dtype the weights are stored in.

    Logits start with a spread of about one, differing from sample to sample. From almost none, the first steps only
    teach what all samples share, and a VLM trained from scratch forgets to look: its features become the same for all.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight.float(), self.bias.float())


class DistributionalValueHead(PooledTrunk):
    """[prefix, state] -> logits [B, num_bins] float32; ``state_dim`` None: the state is not read."""

    def __init__(self, config: ModelConfig, prefix_width: int, state_dim: int | None, num_bins: int):
        super().__init__(config, prefix_width, state_dim)
        self.output = BinsOutput(config.qv_hidden_size, num_bins)

    def forward(self, prefix: PrefixFeatures, state: Tensor) -> Tensor:
        return self.output(self.features(prefix, state))


class DistributionalCritic(nn.Module):
    """The critic of ``value.critic: distributional``: V alone."""

    def __init__(self, config: ModelConfig, prefix_width: int, state_dim: int | None, num_bins: int):
        super().__init__()
        self.v = DistributionalValueHead(config, prefix_width, state_dim, num_bins)
