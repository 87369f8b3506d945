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

from utils import InputError, transforms
from utils.batches import PerImageDataset
from utils.recipes import Recipe
from utils.transforms import BatchAugmentation, Normalization, albumentations_pipeline

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.49, 0.3, 0.75), (0.25, 0.2, 0.3)
OFF = Recipe(name="off", padding=0, flip=0, cutout=0)
DRAWS = 2000


def in_batches(images, recipe, statistics=PLAIN, *, seed=0):
    return BatchAugmentation(recipe, *statistics)(images, torch.Generator().manual_seed(seed))


def one_by_one(images, recipe, statistics=PLAIN, *, seed=0):
    pipeline = albumentations_pipeline(recipe, *statistics, size=tuple(images.shape[-2:]))
    dataset = PerImageDataset(images, torch.zeros(len(images)), pipeline)
    return torch.stack([dataset[seed, index][0] for index in range(len(images))])


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
        picture.expand(DRAWS, -1, -1, -1), OFF.replace(padding=4, padding_mode=mode)
    )
    assert {output.numpy().tobytes() for output in pixels(outputs)} == crops


@settings(max_examples=50)
@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=6)), st.integers(0, 6))
def test_pad_is_numpys(images, padding):
    widths = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = transforms.pad(torch.from_numpy(images), padding)
    assert np.array_equal(padded, np.pad(images, widths))
    if padding < min(images.shape[2:]):
        mirrored = transforms.pad(torch.from_numpy(images), padding, "reflect")
        assert np.array_equal(mirrored, np.pad(images, widths, mode="reflect"))
    else:
        with pytest.raises(InputError, match="mirrored"):
            transforms.pad(torch.from_numpy(images), padding, "reflect")


def test_other_padding(augment):
    outputs = augment(codes().expand(300, -1, -1, -1), OFF.replace(padding=2))
    middle = pixels(outputs)[:, :2, 16, 16].int() - 116
    assert len(middle.unique(dim=0)) == 25 and middle.abs().max() == 2


@pytest.mark.parametrize("probability", [0, 0.5, 0.8, 1])
def test_flips_are_left_to_right_at_the_given_probability(augment, probability):
    picture = codes()
    outputs = pixels(augment(picture.expand(DRAWS, -1, -1, -1), OFF.replace(flip=probability)))
    mirrored = (outputs == picture.flip(2)).flatten(1).all(1)
    assert ((outputs == picture).flatten(1).all(1) ^ mirrored).all()
    share = mirrored.double().mean().item()
    assert share == pytest.approx(probability, abs=0.05 if 0 < probability < 1 else 0)


# Cutout


def test_hole_is_64_pixels_of_the_mean_in_a_square_inside(augment):
    """After normalisation 0 is the data set's mean; white is far from it."""
    outputs = augment(white(DRAWS), OFF.replace(cutout=8), (MEAN, STD))
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
    outputs = augment(white(DRAWS, 16), OFF.replace(cutout=8), (MEAN, STD))
    assert len({hole.numpy().tobytes() for hole in outputs[:, 0] == 0}) == 81


def test_outside_the_hole_nothing_changes(augment):
    picture = codes().expand(100, -1, -1, -1)
    outputs = augment(picture, OFF.replace(cutout=8), (MEAN, STD))
    plain = augment(picture, OFF, (MEAN, STD))
    assert torch.equal(outputs, torch.where(outputs == 0, 0, plain))


def test_a_share_of_the_images_gets_a_hole(augment):
    recipe = OFF.replace(cutout=8, cutout_share=0.3)
    holes = (augment(white(DRAWS), recipe, (MEAN, STD)) == 0).all(1).sum((1, 2))
    assert set(holes.tolist()) == {0, 64}
    assert (holes == 64).double().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("size", [0, 1, 12])
def test_other_hole_sizes(augment, size):
    outputs = augment(white(50), OFF.replace(cutout=size), (MEAN, STD))
    assert ((outputs == 0).sum((2, 3)) == size**2).all()


def test_cutout_that_does_not_fit():
    with pytest.raises(InputError, match="cutout of 8 does not fit 32×7 pixels"):
        transforms.cutout(torch.ones(2, 3, 32, 7), 8)


# Rotation and brightness


def smooth_picture(height=32, width=32):
    """uint8 (1, 3, height, width), without edges."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + y / 9), np.cos(y / 6), np.sin(x / 11 - y / 7)])
    return torch.from_numpy((127 + 100 * waves).round().astype(np.uint8))[None]


@pytest.mark.parametrize("size", [(32, 32), (40, 32)])
@pytest.mark.parametrize("degrees", [-20, -5, 0, 7, 90])
def test_rotation_agrees_with_albumentations(degrees, size, monkeypatch):
    """Same sign, centre and border; its result is rounded to whole numbers."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import looks online
    import albumentations

    image = smooth_picture(*size)
    turn = albumentations.Rotate((degrees, degrees), p=1)
    expected = turn(image=image[0].permute(1, 2, 0).numpy())["image"]
    rotated = transforms.rotate(image.float(), torch.tensor([float(degrees)]))[0].permute(1, 2, 0)
    assert (rotated - torch.from_numpy(expected)).abs().max() < 0.6


def test_rotation_is_anticlockwise_about_the_centre():
    image = torch.zeros(1, 1, 33, 33)
    image[..., 16, 26] = 255  # right of the centre
    rotated = transforms.rotate(image, torch.tensor([90.0]))
    assert rotated.argmax() == 6 * 33 + 16  # above it
    assert rotated.sum() == pytest.approx(255, abs=1e-2)


def test_each_image_is_turned_by_its_own_angle_within_the_limit():
    """A spot right of the centre tells the angle: half a pixel is a degree."""
    image = torch.zeros(3, 65, 65, dtype=torch.uint8)
    image[:, 30:35, 58:63] = 255  # 28 pixels from the centre
    turned = in_batches(image.expand(400, -1, -1, -1), OFF.replace(rotation=20))[:, 0].double()
    places = torch.arange(65.0) - 32
    mass = turned.sum((1, 2))
    x, y = ((turned.sum(axis) * places).sum(1) / mass for axis in (1, 2))
    angles = torch.atan2(-y, x).rad2deg()
    assert len(angles.unique()) > 390
    assert -20.2 < angles.min() < -19 and 19 < angles.max() < 20.2
    assert abs(angles.mean()) < 2


def test_brightness_is_a_factor_of_each_image():
    grey = torch.full((300, 3, 32, 32), 100, dtype=torch.uint8)
    grey[:, :, :4] = 0
    levels = 255 * in_batches(grey, OFF.replace(brightness=0.2))
    assert (levels[:, :, :4] == 0).all(), "black does not stay black"
    factors = levels[:, :, 4:].flatten(1) / 100
    assert (factors.amin(1) == factors.amax(1)).all(), "not one for all its pixels"
    assert 0.79 <= factors.min() < 0.83 and 1.17 < factors.max() <= 1.201


def test_nothing_is_brighter_than_white():
    assert in_batches(white(50), OFF.replace(brightness=0.5)).max() == 1


# Draws


def test_each_image_has_its_own_draws(augment):
    outputs = augment(codes().expand(50, -1, -1, -1), Recipe(name="all"), (MEAN, STD))
    assert len({output.numpy().tobytes() for output in outputs}) >= 49


def test_seed_fixes_the_draws(augment):
    images, recipe = codes().expand(20, -1, -1, -1), Recipe(name="all")
    first = augment(images, recipe, seed=3)
    assert torch.equal(first, augment(images, recipe, seed=3))
    assert not torch.equal(first, augment(images, recipe, seed=4))


def test_offsets_flip_and_cutout_are_independent_of_each_other(augment):
    """Seeded alike, as albumentations' Compose does it, flip and row correlate by -0.85."""
    recipe = OFF.replace(padding=4, flip=0.5, cutout=4)
    outputs = augment(codes().expand(DRAWS, -1, -1, -1), recipe, ((0.5,) * 3, (1.0,) * 3))
    hole = (outputs == 0).all(1)
    red, green, blue = (255 * (outputs + 0.5)).round().unbind(1)
    inside = (blue == 255) & ~hole  # neither the border nor the hole

    def only(values, inside):
        """The value that all places inside have in common."""
        return values.masked_fill(~inside, float("nan")).flatten(1).nanmedian(1).values

    flipped = only(green.diff(dim=2), inside[..., 1:] & inside[..., :-1]) < 0
    places = torch.arange(32.0)
    across = torch.where(flipped.view(-1, 1, 1), places.flip(0), places)
    draws = torch.stack([
        flipped.float(), only(red - places.view(32, 1), inside), only(green - across, inside),
        hole.any(2).byte().argmax(1).float(), hole.any(1).byte().argmax(1).float(),
    ])
    assert [len(draw.unique()) for draw in draws] == [2, 9, 9, 29, 29]
    assert (draws.corrcoef() - torch.eye(5)).abs().max() < 0.1


def test_torchs_own_random_state_plays_no_part(augment):
    images, recipe = codes().expand(20, -1, -1, -1), Recipe(name="all")
    before = torch.get_rng_state()
    first = augment(images, recipe)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(first, augment(images, recipe))


def test_without_rotation_and_brightness_nothing_is_drawn_for_them():
    """Crop, flip and cutout draw as in the runs that were recorded before there were these."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(4)
    expected = transforms.random_crop(images, 4, generator)
    expected = transforms.random_flip(expected, 0.5, generator)
    expected = transforms.cutout(Normalization(MEAN, STD)(expected), 8, generator)
    assert torch.equal(in_batches(images, Recipe(name="all"), (MEAN, STD), seed=4), expected)


# Normalisation


def test_without_augmentation_images_are_normalised_alone(augment):
    images = torch.randint(0, 256, (20, 3, 40, 36), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    expected = ((images.double() / 255 - mean) / std).float()
    for outputs in (augment(images, OFF, (MEAN, STD)), Normalization(MEAN, STD)(images)):
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_a_float_input_stays_as_it_is():
    images = torch.full((1, 3, 2, 2), 255.0)
    assert Normalization(*PLAIN)(images).unique().tolist() == [1]
    assert images.unique().tolist() == [255]


@settings(max_examples=30)
@given(arrays(np.uint8, (2, 3, 4, 5)), st.floats(0, 1), st.floats(0.05, 1))
def test_normalisation_has_an_inverse(images, mean, std):
    images = torch.from_numpy(images)
    normalize = Normalization([mean] * 3, [std] * 3)
    back = normalize.inverse(normalize(images))
    assert back.min() >= 0 and back.max() <= 1
    assert torch.equal(pixels(back), images)


# Sizes


def test_sizes_by_epoch():
    """The whole augmented picture is shrunk, not cropped, and only where the epoch says so."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    recipe = Recipe(name="sizes", epochs=6, sizes=(16, 24, 32))
    whole = in_batches(images, recipe.replace(sizes=()), (MEAN, STD), seed=1)
    augment = BatchAugmentation(recipe, MEAN, STD)
    for epoch, size in enumerate((16, 16, 24, 24, 32, 32)):
        small = augment(images, torch.Generator().manual_seed(1), epoch)
        assert small.shape == (4, 3, size, size)
        torch.testing.assert_close(
            small.mean((2, 3)), whole.mean((2, 3)), rtol=0, atol=0 if size == 32 else 0.05
        )


@pytest.mark.parametrize("size", [None, 24])
def test_resize_to_the_size_it_has_leaves_the_images_as_they_are(size):
    images = torch.randn(2, 3, 24, 24)
    assert transforms.resize(images, size) is images
