"""The action expert: adaLN-zero start, what may and may not change a velocity, draws sharing one prefix."""

import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.models.dit_cross import DiTCrossExpert
from recap_ds.models.vlm import PrefixFeatures
from tests.tiny import tiny_config, wake

PREFIX_WIDTH, NUM_TOKENS, BATCH, DRAWS = 16, 7, 3, 2
CONFIG = tiny_config()
CHUNK = CONFIG.chunk_size


def build(awake=True):
    torch.manual_seed(0)
    expert = DiTCrossExpert(CONFIG.model, PREFIX_WIDTH, CONFIG.max_state_dim, CONFIG.max_action_dim)
    if awake:
        wake(expert)
    return expert


def prefix():
    hidden = torch.randn(BATCH, NUM_TOKENS, PREFIX_WIDTH, generator=torch.Generator().manual_seed(1))
    return PrefixFeatures(hidden, torch.arange(NUM_TOKENS) < torch.tensor([[7], [3], [5]]))


def arguments(**changes):
    """What ``forward`` takes after the context."""
    generator = torch.Generator().manual_seed(2)
    values = {
        "state": torch.randn(BATCH, CONFIG.max_state_dim, generator=generator),
        "x_t": torch.randn(BATCH, DRAWS, CHUNK, CONFIG.max_action_dim, generator=generator),
        "time": torch.rand(BATCH, DRAWS, generator=generator),
        "indicator": torch.tensor([[0, 1], [2, 0], [1, 2]]),
        "valid": torch.arange(CHUNK) < torch.tensor([[4], [2], [1]]),
    }
    return {**values, **changes}


def velocity(expert, features=None, **changes):
    return expert(expert.encode_prefix(features or prefix()), **arguments(**changes))


def test_the_velocity_starts_at_exactly_zero():
    field = velocity(build(awake=False))
    assert field.shape == (BATCH, DRAWS, CHUNK, CONFIG.max_action_dim)
    assert field.dtype == torch.float32
    assert field.eq(0).all()


@pytest.mark.parametrize("changed", ["state", "x_t", "time", "indicator"])
def test_every_input_reaches_the_velocity(changed):
    expert, given = build(), arguments()[changed]
    other = (given + 1) % len(INDICATOR_IDS) if changed == "indicator" else given + 0.5
    difference = velocity(expert, **{changed: other}) - velocity(expert)
    assert difference.abs().amax(dim=(2, 3)).min() > 1e-4


def test_real_prefix_tokens_reach_the_velocity_and_masked_ones_do_not():
    expert, features = build(), prefix()
    mask = features.mask[..., None]
    field = velocity(expert)
    masked = features._replace(hidden=torch.where(mask, features.hidden, torch.randn_like(features.hidden)))
    torch.testing.assert_close(velocity(expert, masked), field)
    assert (velocity(expert, features._replace(hidden=-features.hidden)) - field).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_the_order_of_the_chunk_matters():
    expert, x_t = build(), arguments()["x_t"]
    valid = torch.ones(BATCH, CHUNK, dtype=torch.bool)
    flipped = velocity(expert, x_t=x_t.flip(2), valid=valid).flip(2)
    # An expert without positions would be equivariant: flipping in and out again would change nothing.
    assert (flipped - velocity(expert, valid=valid)).abs().amax(dim=(2, 3)).min() > 1e-3


def test_every_frame_gets_its_own_velocity():
    expert = build(awake=False)  # sleeping blocks: no frame sees another
    wake(expert.action_out)
    x_t, valid = arguments()["x_t"], torch.ones(BATCH, CHUNK, dtype=torch.bool)
    moved = x_t.clone()
    moved[:, :, 2] += 1.0
    difference = velocity(expert, x_t=moved, valid=valid) - velocity(expert, x_t=x_t, valid=valid)
    changed = difference.abs().amax(dim=(0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_what_pads_a_chunk_changes_nothing():
    expert, given = build(), arguments()
    x_t, valid = given["x_t"], given["valid"][:, None, :, None]
    padded = velocity(expert, x_t=torch.where(valid, x_t, 100.0 * torch.randn_like(x_t)))
    torch.testing.assert_close(torch.where(valid, padded, 0.0), torch.where(valid, velocity(expert), 0.0))
    # Equal to a chunk that ends there.
    short = velocity(expert, x_t=x_t[:, :, :1], valid=given["valid"][:, :1])
    torch.testing.assert_close(velocity(expert)[2, :, :1], short[2])


def test_draws_equal_separate_calls():
    expert, given = build(), arguments()
    together = velocity(expert)
    for draw in range(DRAWS):
        one = {name: given[name][:, draw : draw + 1] for name in ("x_t", "time", "indicator")}
        torch.testing.assert_close(velocity(expert, **one)[:, 0], together[:, draw])


def test_a_kept_context_equals_one_computed_anew():
    expert = build()
    context = expert.encode_prefix(prefix())
    assert len(context.keys) == len(context.values) == CONFIG.model.action_expert_num_layers
    first, second = expert(context, **arguments()), expert(context, **arguments())
    assert torch.equal(first, second)
    assert torch.equal(first, velocity(expert))


def test_samples_do_not_see_each_other():
    expert, features, given = build(), prefix(), arguments()
    alone = expert(
        expert.encode_prefix(PrefixFeatures(*(None if part is None else part[1:2] for part in features))),
        **{name: value[1:2] for name, value in given.items()},
    )
    torch.testing.assert_close(alone[0], velocity(expert)[1])


def test_activation_checkpointing_gives_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        expert = build()
        expert.activation_checkpointing = checkpointing
        features = prefix()
        features.hidden.requires_grad_()
        velocity(expert, features).square().sum().backward()
        gradients.append([features.hidden.grad, *(parameter.grad for parameter in expert.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_prefix_without_a_real_token_gives_finite_velocities():
    features = prefix()
    empty = features._replace(mask=torch.zeros_like(features.mask))
    assert velocity(build(), empty).isfinite().all()
