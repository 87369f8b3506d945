"""Augmentation and normalisation, once image by image and once for whole batches.

Both do what the recipe says, by default: pad 4 pixels a side (32×32 becomes 40×40), crop a random
32×32, flip left-right with probability 0.5, normalise, and set one random 8×8 square to 0, which
after normalisation is the data set's mean. Only the batched form can turn images, brighten or
darken them, and bring them to another size.
"""

import os

import torch
from torch.nn import functional as F

from utils import InputError
from utils.data import Normalization


class BatchAugmentation:
    """The recipe's transforms for a whole batch, in torch, on the device the batch is on.

    Called with uint8 images (N, 3, H, W) it gives float32 images, of the same shape or, in an
    epoch for which the recipe has a size, (N, 3, size, size). Each image has draws of its own,
    from `generator`, on the images' device; without one from torch's own.
    """

    def __init__(self, recipe, mean, std):
        self.recipe = recipe
        self.normalize = Normalization(mean, std)

    def __call__(self, images, generator=None, epoch=0):
        recipe = self.recipe
        images = random_crop(images, recipe.padding, generator, mode=recipe.padding_mode)
        if not recipe.alternating_flip:
            images = random_flip(images, recipe.flip, generator)
        elif recipe.flip and epoch % 2:
            images = images.flip(3)  # a random share of them is mirrored already
        if recipe.rotation:
            images = random_rotation(images.float(), recipe.rotation, generator)
        if recipe.brightness:
            images = random_brightness(images.float(), recipe.brightness, generator)
        images = self.normalize(images)
        images = cutout(images, recipe.cutout, generator, share=recipe.cutout_share)
        return resize(images, recipe.size(epoch))


def albumentations_pipeline(recipe, mean, std, *, size=(32, 32)):
    """The recipe's transforms for one image as an albumentations pipeline.

    It is called with `image=` a uint8 array (H, W, 3) of that `size`, and gives {"image": float32
    tensor (3, H, W)}.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import looks online
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    height, width = size
    borders = {"constant": cv2.BORDER_CONSTANT, "reflect": cv2.BORDER_REFLECT_101}
    steps = [
        # PadIfNeeded pads *up to* a size, so the size to name is 40, not 36.
        A.PadIfNeeded(
            min_height=height + 2 * recipe.padding,
            min_width=width + 2 * recipe.padding,
            border_mode=borders[recipe.padding_mode],
        ),
        A.RandomCrop(height, width),
        A.HorizontalFlip(p=recipe.flip),
        A.Normalize(mean=tuple(map(float, mean)), std=tuple(map(float, std))),
    ]
    if recipe.cutout:
        side = (recipe.cutout, recipe.cutout)
        # after Normalize, so that 0 is the mean
        steps.append(A.CoarseDropout(
            num_holes_range=(1, 1), hole_height_range=side, hole_width_range=side,
            p=recipe.cutout_share,
        ))
    return A.Compose([*steps, ToTensorV2()])


def resize(images, size):
    """Float (N, C, H, W) to (N, C, size, size), bilinear, averaged where it shrinks.

    None, or the size that they have, leaves them as they are.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _draw(count, upper, like, generator):
    """`count` whole numbers from 0 to `upper`, both included, on the device of `like`."""
    return torch.randint(0, upper + 1, (count,), device=like.device, generator=generator)


def pad(images, padding, mode="constant"):
    """(N, C, H, W) with `padding` pixels more a side: black, or for "reflect" mirrored.

    Raises InputError where an image is too small to be mirrored.
    """
    if mode == "constant":
        return F.pad(images, [padding] * 4)
    side = min(images.shape[-2:])
    if padding >= side:
        raise InputError(f"a side of {side} pixels can't be mirrored by a padding of {padding}")
    # by way of float, since some devices mirror nothing else
    return F.pad(images.float(), [padding] * 4, mode=mode).to(images.dtype)


def random_crop(images, padding, generator=None, *, mode="constant"):
    """Pads (N, C, H, W) by `padding` pixels a side and crops each image at its own offset."""
    n, _, height, width = images.shape
    top, left = (_draw(n, 2 * padding, images, generator) for _ in range(2))
    # Every crop that there is, as a view: (N, C, offsets down, offsets across, H, W).
    crops = pad(images, padding, mode).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(n, device=images.device), :, top, left]


def random_flip(images, probability, generator=None):
    """Mirrors each image of (N, C, H, W) left to right with that probability."""
    numbers = torch.rand(len(images), device=images.device, generator=generator)
    return torch.where(numbers.view(-1, 1, 1, 1) < probability, images.flip(3), images)


def rotate(images, degrees):
    """Turns each image of float (N, C, H, W) anticlockwise about its centre, by `degrees` (N,).

    Bilinear; what comes in from outside is black.
    """
    height, width = images.shape[-2:]
    angle = degrees.deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where each pixel of the result comes from, so the turn back; y points down, and both axes
    # run from -1 to 1 whatever the sides are.
    matrix = torch.stack(
        [cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1
    ).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _draw_around_zero(upper, images, generator):
    """A number from -upper to upper for each image."""
    numbers = torch.rand(len(images), device=images.device, generator=generator)
    return upper * (2 * numbers - 1)


def random_rotation(images, degrees, generator=None):
    """Turns each image of float (N, C, H, W) by its own angle, at most `degrees` either way."""
    return rotate(images, _draw_around_zero(degrees, images, generator))


def random_brightness(images, spread, generator=None):
    """Multiplies each image of float (N, C, H, W) in 0..255 by its own 1 - spread .. 1 + spread."""
    factors = 1 + _draw_around_zero(spread, images, generator)
    return (images * factors.view(-1, 1, 1, 1)).clamp(0, 255)


def cutout(images, size, generator=None, *, share=1.0):
    """Sets a `size`×`size` square of each image to 0, at a place of its own wholly inside.

    `images`: normalised float (N, C, H, W), where 0 is the data set's mean; changed in place.
    `share`: the probability of that; 1 takes no draw. Raises InputError where the square does not
    fit.
    """
    n, _, height, width = images.shape
    if size > min(height, width):
        raise InputError(f"a cutout of {size} does not fit {height}×{width} pixels; lower it")
    top = _draw(n, height - size, images, generator).view(n, 1, 1)
    left = _draw(n, width - size, images, generator).view(n, 1, 1)
    image, side = (torch.arange(count, device=images.device) for count in (n, size))
    hole = image.view(n, 1, 1), slice(None), top + side.view(size, 1), left + side
    if share < 1:
        cut = torch.rand(n, device=images.device, generator=generator) < share
        images[hole] = torch.where(cut.view(n, 1, 1, 1), 0, images[hole])
    else:
        images[hole] = 0
    return images
