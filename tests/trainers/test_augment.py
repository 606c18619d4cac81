"""Augmentation depends on seed, epoch and index alone, and is what its name says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from converter.specs import InputSpec
from trainers.augment import (
    crop_for_testing,
    crop_for_training,
    normalise,
    seeded,
    shift_and_flip,
    uniform,
)


def test_the_hash_is_splitmix64():
    # The first three outputs for seed 1234567, as published with the algorithm.
    from trainers.augment import _GOLDEN, _hash

    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [1234567, *(1234567 + _GOLDEN * k for k in (1, 2))]
    wrapped = [(s + 2**63) % 2**64 - 2**63 for s in states]
    found = [int(_hash(torch.tensor([s]))[0]) % 2**64 for s in wrapped]
    assert found == published


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(3, 5, torch.arange(40_000), 2)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = torch.histc(column, 20, 0, 1)
        # χ² with 19 degrees of freedom: 43.8 is the 99.9th percentile.
        assert ((counts - 2000).square() / 2000).sum() < 43.8
    series = [draws[:, 0], draws[:, 1], draws[:, 0].roll(1)]
    series += [
        uniform(seed, epoch, torch.arange(40_000), 1)[:, 0] for seed, epoch in [(4, 5), (3, 6)]
    ]
    assert torch.corrcoef(torch.stack(series)).triu(1).abs().max() < 0.025


@given(st.integers(0, 2**31), st.integers(0, 1000), st.lists(st.integers(0, 2**40), min_size=1))
def test_a_draw_depends_on_its_own_coordinates_alone(seed, epoch, indices):
    together = uniform(seed, epoch, torch.tensor(indices), 3)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, uniform(seed, epoch, torch.tensor([index]), 3)[0])
        assert torch.equal(row[:2], uniform(seed, epoch, torch.tensor([index]), 2)[0])


@given(
    st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 6)] * 2), st.integers(0, 3), st.booleans()
)
def test_shifting_is_a_crop_after_padding(shape, shift, flip):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    draws = uniform(0, 0, torch.arange(shape[0]), 3)
    moved = shift_and_flip(images, draws, shift=shift, flip=flip, fill=7)
    padded = F.pad(images, (shift,) * 4, value=7)
    for image, draw, whole in zip(moved, draws.tolist(), padded, strict=True):
        top, left = (int(d * (2 * shift + 1)) for d in draw[:2])
        crop = whole[:, top : top + shape[2], left : left + shape[3]]
        assert torch.equal(image, crop.flip(2) if flip and draw[2] < 0.5 else crop)


def test_every_shift_and_both_mirrorings_occur_equally_often():
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3) + 1
    images = image.expand(18_000, 1, 3, 3)
    moved = shift_and_flip(images, uniform(1, 1, torch.arange(18_000), 3), shift=1, flip=True)
    _, counts = moved.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    assert ((counts - 1000).square() / 1000).sum() < 40.8  # χ², 17 degrees, 99.9th percentile


def test_large_images_are_cropped_by_their_own_seed_and_the_caller_s_is_left_alone():
    spec = InputSpec.natural((3, 16, 16))
    change, image = crop_for_training(spec, flip=True), torch.randint(0, 256, (3, 40, 50)).byte()
    before = torch.get_rng_state()
    one = seeded(change, image, 0, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert one.shape == (3, 16, 16)
    assert torch.equal(one, seeded(change, image, 0, 1, 2))
    assert not torch.equal(one, seeded(change, image, 0, 2, 2))


@pytest.mark.parametrize(("resize", "inner"), [(None, 12), (24, 24)])
def test_testing_takes_the_centre_after_resizing_the_short_side(resize, inner):
    spec = InputSpec.natural((3, 12, 12), resize=resize)
    image = torch.zeros(3, 48, 96, dtype=torch.uint8)
    image[:, :, 48:] = 200
    fitted = crop_for_testing(spec)(image)
    assert fitted.shape == (3, 12, 12)
    # The edge between the halves stays in the middle, whatever the size.
    middle = fitted.float().mean((0, 1))
    assert middle[:5].max() < 5
    assert middle[7:].min() > 195


@given(*[st.integers(1, 90)] * 2, st.integers(2, 40), st.sampled_from([None, 45]))
def test_a_square_is_cut_as_torchvision_s_resize_and_crop_would(height, width, side, resize):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    steps = v2.Resize(resize or side, antialias=True), v2.CenterCrop((side, side))
    fitted = crop_for_testing(InputSpec.natural((3, side, side), resize=resize))(image)
    assert torch.equal(fitted, v2.Compose(steps)(image))


@given(*[st.integers(1, 90)] * 2, *[st.integers(2, 40)] * 2)
def test_a_crop_of_any_shape_is_filled(height, width, rows, columns):
    white = torch.full((1, height, width), 255, dtype=torch.uint8)
    fitted = crop_for_testing(InputSpec.plain((1, rows, columns)))(white)
    assert fitted.shape == (1, rows, columns)
    assert fitted.eq(255).all()


@given(*[st.integers(2, 40)] * 2, st.integers(1, 4))
def test_nothing_is_left_out_of_an_image_in_the_proportions_of_the_crop(rows, columns, times):
    image = torch.randint(0, 256, (3, rows * times, columns * times), dtype=torch.uint8)
    fitted = crop_for_testing(InputSpec.natural((3, rows, columns)))(image)
    assert torch.equal(fitted, v2.functional.resize(image, [rows, columns], antialias=True))


@pytest.mark.parametrize("turned", [False, True])
def test_both_ends_of_a_wide_or_tall_image_are_kept(turned):
    image = torch.zeros(1, 25, 66, dtype=torch.uint8)
    image[:, :, :10] = image[:, :, -10:] = 255
    shape = (1, 64, 24) if turned else (1, 24, 64)
    fitted = crop_for_testing(InputSpec.plain(shape))(image.mT if turned else image)
    fitted = fitted.mT if turned else fitted
    assert fitted[:, :, :8].eq(255).all()
    assert fitted[:, :, -8:].eq(255).all()
    assert fitted[:, :, 12:-12].eq(0).all()


def test_images_of_the_right_size_are_left_as_they_are():
    image = torch.randint(0, 256, (3, 12, 12)).byte()
    assert torch.equal(crop_for_testing(InputSpec.natural((3, 12, 12)))(image), image)


def test_normalising_is_mean_and_deviation_of_pixels_in_0_to_1():
    spec = InputSpec(shape=(3, 2, 2), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = torch.randint(0, 256, (4, 3, 2, 2)).byte()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (spec.mean, spec.std))
    expected = (image.double() / 255 - mean) / std
    torch.testing.assert_close(normalise(image, spec).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(normalise(image, spec)[0], normalise(image[0], spec))
