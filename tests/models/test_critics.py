"""Q and V: windows and masks, independent heads, and float32 arithmetic over bfloat16 weights."""

import pytest
import torch

from recap_ds.models.critics import Critic, QNetworks, ValueOutput
from recap_ds.models.vlm import PrefixFeatures
from tests.tiny import tiny_config

PREFIX_WIDTH, NUM_TOKENS, BATCH = 16, 7, 5
CONFIG = tiny_config()


def build(**model):
    torch.manual_seed(0)
    config = tiny_config(model=model)
    sizes = (PREFIX_WIDTH, config.max_state_dim, config.chunk_size, config.max_action_dim)
    critic = Critic(config.model, *sizes)
    with torch.no_grad():  # heads start almost flat; make their inputs count
        for module in critic.modules():
            if isinstance(module, ValueOutput):
                module.weight.mul_(100.0)
    return critic


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, NUM_TOKENS, PREFIX_WIDTH, generator=generator).to(dtype)
    mask = torch.arange(NUM_TOKENS) < torch.tensor([[7], [3], [1], [5], [7]])
    state = torch.randn(BATCH, CONFIG.max_state_dim, generator=generator)
    actions = torch.randn(BATCH, CONFIG.chunk_size, CONFIG.max_action_dim, generator=generator)
    valid = torch.arange(CONFIG.chunk_size) < torch.tensor([[4], [2], [1], [3], [0]])
    return PrefixFeatures(hidden, mask), state, actions, valid


def test_values_start_near_the_middle_of_their_range():
    torch.manual_seed(0)
    prefix, state, actions, valid = inputs()
    critic = Critic(CONFIG.model, PREFIX_WIDTH, CONFIG.max_state_dim, CONFIG.chunk_size, CONFIG.max_action_dim)
    q, v = critic.q(prefix, state, actions, valid), critic.v(prefix, state)
    assert q.shape == (2, BATCH)
    assert v.shape == (BATCH,)
    assert (torch.cat([q.flatten(), v]) + 0.5).abs().max() < 0.1


def test_actions_outside_the_window_change_nothing():
    critic = build()
    prefix, state, actions, valid = inputs()
    q = critic.q(prefix, state, actions, valid)
    assert torch.equal(q, critic.q(prefix, state, actions.masked_fill(~valid[..., None], torch.nan), valid))
    assert not torch.equal(q, critic.q(prefix, state, actions + 1.0, valid))


def test_q_tells_a_short_window_from_actions_of_zero():
    critic = build()
    prefix, state, actions, valid = inputs()
    zero = torch.zeros_like(actions)
    short, long = critic.q(prefix, state, zero, valid), critic.q(prefix, state, zero, torch.ones_like(valid))
    assert short[:, 1:].sub(long[:, 1:]).abs().min() > 1e-4
    assert torch.equal(short[:, 0], long[:, 0])


def test_masked_prefix_tokens_change_nothing_and_real_ones_do():
    critic = build()
    prefix, state, actions, valid = inputs()
    noisy = torch.where(prefix.mask[..., None], prefix.hidden, torch.randn_like(prefix.hidden))
    torch.testing.assert_close(critic.v(prefix._replace(hidden=noisy), state), critic.v(prefix, state))
    torch.testing.assert_close(
        critic.q(prefix._replace(hidden=noisy), state, actions, valid), critic.q(prefix, state, actions, valid)
    )
    assert (critic.v(prefix._replace(hidden=-prefix.hidden), state) - critic.v(prefix, state)).abs().min() > 1e-4


@pytest.mark.parametrize("num_heads", [1, 3])
def test_heads_are_independent(num_heads):
    critic = build(num_q_networks=num_heads)
    q = critic.q(*inputs())
    assert q.shape == (num_heads, BATCH)
    assert len({tuple(row) for row in q.tolist()}) == num_heads
    q[0].sum().backward()
    touched = {name.split(".")[1] for name, parameter in critic.q.named_parameters() if parameter.grad.any()}
    assert touched == {"0"}


def test_the_last_layer_is_float32_over_bfloat16_weights():
    critic = build().bfloat16()
    seen = {}
    critic.v.output.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    prefix, state, actions, valid = inputs(torch.bfloat16)
    v = critic.v(prefix, state)
    output = critic.v.output
    exact = seen["x"].double() @ output.weight.double()[0] + output.bias.double()
    assert seen["x"].dtype == torch.bfloat16
    assert v.dtype == critic.q(prefix, state, actions, valid).dtype == torch.float32
    torch.testing.assert_close(v.double(), exact, atol=1e-6, rtol=0)
    # Finer than bfloat16 could say.
    assert (v - v.bfloat16().float()).abs().max() > 1e-4


def test_a_target_critic_has_the_shape_of_the_online_q():
    online = build().q
    target = QNetworks(CONFIG.model, PREFIX_WIDTH, CONFIG.max_state_dim, CONFIG.chunk_size, CONFIG.max_action_dim)
    target.load_state_dict(online.state_dict())
    assert torch.equal(online(*inputs()), target(*inputs()))
