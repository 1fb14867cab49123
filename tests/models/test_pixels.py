"""Images on the device: range, whole-pixel shifts and colour, as a function of the batch's draws alone."""

import pytest
import torch

from recap_ds.models.pixels import MAX_SHIFT, augment, to_pixels, training_pixels

IDENTITY = torch.full((1, 5), 0.5)
SIDE = 32


def images(batch_size, num_cameras=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, num_cameras, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def draws(**changes):
    names = ("shift_y", "shift_x", "brightness", "contrast", "saturation")
    return torch.tensor([[changes.get(name, 0.5) for name in names]])


def test_uint8_spans_minus_one_to_one():
    assert to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_training_augments_where_it_is_asked_to():
    pictures, moved = images(1), draws(shift_x=0.9, contrast=0.2)
    assert torch.equal(training_pixels(pictures, moved, augmented=False), to_pixels(pictures))
    assert torch.equal(training_pixels(pictures, moved, augmented=True), augment(to_pixels(pictures), moved))


def test_draws_of_one_half_change_nothing():
    pixels = to_pixels(images(1))
    torch.testing.assert_close(augment(pixels, IDENTITY), pixels, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shift_y", "shift_x"), [(1.0, 0.5), (0.5, 0.0), (0.0, 1.0)])
def test_a_shift_moves_by_whole_pixels_and_repeats_the_edge(shift_y, shift_x):
    pixels = to_pixels(images(1))
    shifted = augment(pixels, draws(shift_y=shift_y, shift_x=shift_x))
    # Independent: pad by the edge, then cut the window out.
    most = int(MAX_SHIFT * SIDE)
    padded = torch.nn.functional.pad(pixels[0], [most] * 4, mode="replicate")[None]
    top, left = (most + round((2 * draw - 1) * most) for draw in (shift_y, shift_x))
    expected = padded[..., top : top + SIDE, left : left + SIDE]
    torch.testing.assert_close(shifted, expected, atol=1e-6, rtol=0)


def test_colour_draws_do_what_they_say():
    pixels = 0.3 * to_pixels(images(1))
    assert (augment(pixels, draws(brightness=1.0)) - pixels).mean() == pytest.approx(0.2, abs=1e-5)
    assert augment(pixels, draws(contrast=1.0)).std() > 1.2 * pixels.std()
    assert augment(pixels, draws(saturation=0.0)).var(dim=2).mean() < pixels.var(dim=2).mean()


def test_augmentation_is_a_function_of_the_draws_and_stays_in_range():
    pixels = to_pixels(images(6))
    draw = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    augmented = augment(pixels, draw)
    assert torch.equal(before, torch.random.get_rng_state())
    assert augmented.abs().max() <= 1.0
    # Row by row: a sample's pixels do not depend on its company.
    alone = torch.cat([augment(pixels[i : i + 1], draw[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(augmented, alone)
    assert not torch.equal(augmented, augment(pixels, 1.0 - draw))


def test_the_cameras_of_a_sample_move_together():
    one = images(1, num_cameras=1)
    pixels = to_pixels(torch.cat([one, one], dim=1))
    augmented = augment(pixels, torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3]]))
    assert torch.equal(augmented[:, 0], augmented[:, 1])
