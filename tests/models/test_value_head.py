"""The distributional head: where it starts, what it reads, and float32 arithmetic over bfloat16 weights."""

import math

import torch
from torch.nn import functional

from recap_ds.algo.value_distribution import expected_value
from recap_ds.models.value_head import BinsOutput, DistributionalCritic
from recap_ds.models.vlm import PrefixFeatures
from tests.tiny import tiny_config

PREFIX_WIDTH, NUM_TOKENS, BATCH, NUM_BINS = 16, 7, 5, 201
CONFIG = tiny_config()


def build(state_dim: int | None = CONFIG.max_state_dim) -> DistributionalCritic:
    torch.manual_seed(0)
    return DistributionalCritic(CONFIG.model, PREFIX_WIDTH, state_dim, NUM_BINS)


def inputs() -> tuple[PrefixFeatures, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, NUM_TOKENS, PREFIX_WIDTH, generator=generator)
    mask = torch.arange(NUM_TOKENS) < torch.tensor([[7], [3], [1], [5], [7]])
    return PrefixFeatures(hidden, mask), torch.randn(BATCH, CONFIG.max_state_dim, generator=generator)


def test_it_starts_broad_around_the_middle_value_and_tells_samples_apart():
    logits = build().v(*inputs())
    assert logits.shape == (BATCH, NUM_BINS) and logits.dtype == torch.float32
    probability = logits.softmax(dim=1)
    entropy = -(probability * probability.log()).sum(dim=1)
    assert (entropy > math.log(NUM_BINS) - 1.0).all(), "no bin stands out"
    assert (expected_value(logits) + 0.5).abs().max() < 0.1
    assert logits.std(dim=0).mean() > 0.3


def test_masked_tokens_change_nothing_and_real_ones_and_the_state_do():
    critic = build()
    prefix, state = inputs()
    logits = critic.v(prefix, state)
    dirty = PrefixFeatures(prefix.hidden.masked_fill(~prefix.mask[..., None], 9.0), prefix.mask)
    assert torch.equal(critic.v(dirty, state), logits)
    assert not torch.equal(critic.v(PrefixFeatures(prefix.hidden + prefix.hidden.flip(2), prefix.mask), state), logits)
    assert not torch.equal(critic.v(prefix, state + 1.0), logits)


def test_a_critic_that_does_not_read_the_state_has_no_weights_for_it():
    critic = build(state_dim=None)
    prefix, state = inputs()
    assert torch.equal(critic.v(prefix, state + 1.0), critic.v(prefix, state))
    assert {name for name, _ in build().named_parameters()} - {name for name, _ in critic.named_parameters()} == {
        "v.vector_in.weight",
        "v.vector_in.bias",
    }


def test_the_last_layer_is_float32_whatever_its_weights_are():
    output = BinsOutput(8, NUM_BINS).bfloat16()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    exact = functional.linear(x.double(), output.weight.double(), output.bias.double())
    torch.testing.assert_close(output(x), exact.float(), rtol=1e-5, atol=1e-6)
    critic = build().bfloat16()
    prefix, state = inputs()
    assert critic.v(PrefixFeatures(prefix.hidden.bfloat16(), prefix.mask), state).dtype == torch.float32
