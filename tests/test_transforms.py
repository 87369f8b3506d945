"""Both paths of augmentation, image by image and in batches, against the geometry by hand.

Most tests augment a picture of codes, whose red is the row and whose green is the column, so that
the output tells where each of its pixels came from.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from utils import InputError
from utils.transforms import (
    BatchTransform,
    albumentations_pipeline,
    channel_statistics,
    cutout,
    pad,
)

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
MEAN, STD = (0.49, 0.3, 0.75), (0.25, 0.2, 0.3)
DRAWS = 2000


def in_batches(images, *, seed=0, **options):
    transform = BatchTransform(**options)
    transform.seed(seed)
    return transform(images)


def one_by_one(images, *, seed=0, **options):
    pipeline = albumentations_pipeline(size=tuple(images.shape[-2:]), **options)
    pipeline.set_random_seed(seed)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.stack([pipeline(image=image)["image"] for image in arrays])


@pytest.fixture(params=[in_batches, one_by_one])
def augment(request):
    return request.param


def codes(height=32, width=32):
    """uint8 (3, H, W): red is 100 + row, green is 100 + column, blue is 255."""
    rows, columns = np.mgrid[:height, :width]
    return torch.from_numpy(np.stack([100 + rows, 100 + columns, 0 * rows + 255]).astype(np.uint8))


def pixels(outputs):
    """Back from the scale 0..1 to whole numbers."""
    return (outputs * 255).round().to(torch.uint8)


def white(count, size=32):
    return torch.full((count, 3, size, size), 255, dtype=torch.uint8)


# Statistics


@settings(deadline=None, max_examples=100)
@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_statistics_are_those_of_all_pixels(images):
    mean, std = channel_statistics(torch.from_numpy(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), scaled.std((0, 2, 3)), rtol=0, atol=1e-12)


def test_statistics_of_skewed_channels():
    generator = np.random.default_rng(0)
    shape = (50, 32, 32)
    channels = [
        generator.integers(0, 256, shape),
        255 * generator.beta(0.3, 4, shape),
        250 + 5 * (generator.random(shape) < 0.01),
    ]
    images = np.stack(channels, axis=1).astype(np.uint8)
    mean, std = channel_statistics(torch.from_numpy(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), scaled.std((0, 2, 3)), rtol=0, atol=1e-12)


def test_deviation_is_not_the_mean_of_each_images_own():
    """A black and a white image: neither has any deviation, together they have one half."""
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).to(torch.uint8)
    assert channel_statistics(images)[1].tolist() == [0.5] * 3


# Geometry


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("height, width", [(32, 32), (40, 36)])
def test_outputs_are_the_81_crops_of_the_padded_image(augment, height, width, mode):
    """The same set for both paths, and every crop of it is reached."""
    picture = codes(height, width)
    padded = np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode=mode)
    crops = {
        padded[:, top : top + height, left : left + width].tobytes()
        for top in range(9)
        for left in range(9)
    }
    assert len(crops) == 81
    outputs = augment(
        picture.expand(DRAWS, -1, -1, -1), **PLAIN, padding_mode=mode, flip=0, cutout=0
    )
    assert {output.numpy().tobytes() for output in pixels(outputs)} == crops


@settings(deadline=None, max_examples=50)
@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=6)), st.integers(0, 6))
def test_pad_is_numpys(images, padding):
    widths = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = pad(torch.from_numpy(images), padding)
    assert np.array_equal(padded, np.pad(images, widths))
    if padding < min(images.shape[2:]):
        mirrored = pad(torch.from_numpy(images), padding, "reflect")
        assert np.array_equal(mirrored, np.pad(images, widths, mode="reflect"))
    else:
        with pytest.raises(InputError, match="mirrored"):
            pad(torch.from_numpy(images), padding, "reflect")


def test_other_padding(augment):
    outputs = augment(codes().expand(300, -1, -1, -1), **PLAIN, padding=2, flip=0, cutout=0)
    middle = pixels(outputs)[:, :2, 16, 16].int() - 116
    assert len(middle.unique(dim=0)) == 25 and middle.abs().max() == 2


@pytest.mark.parametrize("probability", [0, 0.5, 0.8, 1])
def test_flips_are_left_to_right_at_the_given_probability(augment, probability):
    picture = codes()
    outputs = pixels(
        augment(picture.expand(DRAWS, -1, -1, -1), **PLAIN, padding=0, flip=probability, cutout=0)
    )
    mirrored = (outputs == picture.flip(2)).flatten(1).all(1)
    assert ((outputs == picture).flatten(1).all(1) ^ mirrored).all()
    share = mirrored.double().mean().item()
    if probability in (0, 1):
        assert share == probability
    else:
        assert share == pytest.approx(probability, abs=0.05)


def test_default_is_padding_4_flip_one_half_cutout_8(augment):
    images = codes().expand(50, -1, -1, -1)
    explicit = augment(images, **PLAIN, padding=4, flip=0.5, cutout=8)
    assert torch.equal(augment(images, **PLAIN), explicit)


# Cutout


def test_hole_is_64_pixels_of_the_mean_in_a_square_inside(augment):
    """After normalisation 0 is the data set's mean; white is far from it."""
    outputs = augment(white(DRAWS), mean=MEAN, std=STD, padding=0)
    holes = outputs == 0
    assert (holes == holes[:, :1]).all(), "channels differ"
    holes = holes[:, 0]
    assert (holes.sum((1, 2)) == 64).all()
    rows, columns = holes.any(2), holes.any(1)
    assert (rows.sum(1) == 8).all() and (columns.sum(1) == 8).all()
    top, left = rows.byte().argmax(1), columns.byte().argmax(1)
    assert rows[torch.arange(DRAWS), top + 7].all() and columns[torch.arange(DRAWS), left + 7].all()
    for corner in (top, left):
        counts = corner.bincount()
        assert len(counts) == 25, "not every place is reached"
        assert counts.min() > 40 and counts.max() < 130  # 80 expected each


def test_hole_of_a_small_image_reaches_every_place(augment):
    outputs = augment(white(DRAWS, 16), mean=MEAN, std=STD, padding=0)
    assert len({hole.numpy().tobytes() for hole in outputs[:, 0] == 0}) == 81


def test_outside_the_hole_nothing_changes(augment):
    picture = codes().expand(100, -1, -1, -1)
    outputs = augment(picture, mean=MEAN, std=STD, padding=0, flip=0)
    plain = augment(picture, mean=MEAN, std=STD, augment=False)
    assert torch.equal(outputs, torch.where(outputs == 0, 0, plain))


@pytest.mark.parametrize("size", [0, 1, 12])
def test_other_hole_sizes(augment, size):
    outputs = augment(white(50), mean=MEAN, std=STD, padding=0, cutout=size)
    assert ((outputs == 0).sum((2, 3)) == size**2).all()


# Draws


def test_each_image_has_its_own_draws(augment):
    outputs = augment(codes().expand(50, -1, -1, -1), mean=MEAN, std=STD)
    assert len({output.numpy().tobytes() for output in outputs}) >= 49


def test_seed_fixes_the_draws(augment):
    images = codes().expand(20, -1, -1, -1)
    first = augment(images, seed=3, mean=MEAN, std=STD)
    assert torch.equal(first, augment(images, seed=3, mean=MEAN, std=STD))
    assert not torch.equal(first, augment(images, seed=4, mean=MEAN, std=STD))


def test_draws_go_on_from_batch_to_batch_until_seeded_again():
    transform = BatchTransform(MEAN, STD)
    images = codes().expand(20, -1, -1, -1)
    transform.seed(1)
    first, second = transform(images), transform(images)
    transform.seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, transform(images))


def test_torchs_own_random_state_plays_no_part(augment):
    images = codes().expand(20, -1, -1, -1)
    before = torch.get_rng_state()
    first = augment(images, mean=MEAN, std=STD)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(first, augment(images, mean=MEAN, std=STD))


# Normalisation


def test_without_augmentation_only_normalises(augment):
    images = torch.randint(0, 256, (20, 3, 40, 36), dtype=torch.uint8)
    before = images.clone()
    outputs = augment(images, mean=MEAN, std=STD, augment=False)
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1).double()) / torch.tensor(
        STD
    ).view(3, 1, 1).double()
    assert outputs.dtype == torch.float32 and outputs.shape == images.shape
    torch.testing.assert_close(outputs.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_both_paths_normalise_alike():
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    options = {"mean": MEAN, "std": STD, "augment": False}
    torch.testing.assert_close(
        in_batches(images, **options), one_by_one(images, **options), rtol=0, atol=1e-6
    )


def test_data_normalised_by_its_own_statistics_has_mean_0_and_deviation_1():
    images = torch.randint(0, 200, (50, 3, 32, 32), dtype=torch.uint8)
    outputs = BatchTransform(*channel_statistics(images), augment=False)(images).double()
    torch.testing.assert_close(
        outputs.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        outputs.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(arrays(np.uint8, (2, 3, 4, 5)), st.floats(0, 1), st.floats(0.05, 1))
def test_denormalize_is_the_inverse(images, mean, std):
    images = torch.from_numpy(images)
    transform = BatchTransform([mean] * 3, [std] * 3, augment=False)
    back = transform.denormalize(transform(images))
    assert back.min() >= 0 and back.max() <= 1
    assert torch.equal(pixels(back), images)


def test_sizes_by_epoch():
    """The whole augmented picture is shrunk, not cropped, and only where the epoch says so."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, sizes=(16, 24, 32))
    whole = BatchTransform((0.5,) * 3, (0.25,) * 3)
    for epoch, size in enumerate((16, 24, 32)):
        transform.seed(1, epoch)
        whole.seed(1)
        small, large = transform(images), whole(images)
        assert small.shape == (4, 3, size, size)
        torch.testing.assert_close(
            small.mean((2, 3)), large.mean((2, 3)), rtol=0, atol=0 if size == 32 else 0.05
        )


def test_cutout_that_does_not_fit():
    with pytest.raises(InputError, match="cutout of 8 does not fit 32×7 pixels"):
        cutout(torch.ones(2, 3, 32, 7), 8)
