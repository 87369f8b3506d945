"""Augmentation and normalisation, once image by image and once for whole batches.

Both do the same: pad 4 pixels a side, black or mirrored (32×32 becomes 40×40), crop a random
32×32, flip left-right with probability 0.5, where the recipe says so turn and brighten or darken,
normalise, and set one random 8×8 square to 0, which after normalisation is the data set's mean.
"""

import os

import torch
from torch.nn import functional as F

from utils import InputError


def channel_statistics(images):
    """Mean and standard deviation of every pixel of each channel, on the scale 0..1.

    `images`: uint8 (N, C, H, W). Returns two float64 tensors (C,). Exact: they are computed
    from the 256 counts of each channel. (The widespread 0.2023, 0.1994, 0.2010 for CIFAR-10 is
    the mean of each image's own deviation, which is smaller.)
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = images.cpu().transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(c, minlength=256) for c in channels])
    shares = counts.double() / channels.shape[1]
    mean = shares @ values
    return mean, (shares @ values**2 - mean**2).sqrt()


def albumentations_pipeline(
    mean, std, *, size=(32, 32), padding=4, padding_mode="constant", flip=0.5, rotation=0,
    brightness=0, cutout=8, augment=True,
):
    """The transforms for one image as an albumentations pipeline.

    `padding_mode`: "constant" for black, or "reflect", which mirrors the image about its outermost
    pixels; what a rotation brings in is black in any case. `rotation`: degrees, at most, either
    way; `brightness` 0.2: factors from 0.8 to 1.2. It is called with `image=` a uint8 array
    (H, W, 3), and gives {"image": float32 tensor (3, H, W)}. `set_random_seed` of the pipeline
    fixes its draws.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import looks online
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    height, width = size
    borders = {"constant": cv2.BORDER_CONSTANT, "reflect": cv2.BORDER_REFLECT_101}
    steps = []
    if augment:
        # PadIfNeeded pads *up to* a size, so the size to name is 40, not 36.
        steps = [
            A.PadIfNeeded(
                min_height=height + 2 * padding,
                min_width=width + 2 * padding,
                border_mode=borders[padding_mode],
                fill=0,
            ),
            A.RandomCrop(height, width),
            A.HorizontalFlip(p=flip),
        ]
        if rotation:
            limit = (-rotation, rotation)
            steps.append(A.Rotate(limit, border_mode=cv2.BORDER_CONSTANT, fill=0, p=1))
        if brightness:
            # A factor. RandomBrightnessContrast would add, and turn the black border grey.
            limit, off = (1 - brightness, 1 + brightness), (1, 1)
            steps.append(
                A.ColorJitter(brightness=limit, contrast=off, saturation=off, hue=(0, 0), p=1)
            )
    steps.append(A.Normalize(mean=tuple(map(float, mean)), std=tuple(map(float, std))))
    if augment and cutout:
        hole = (cutout, cutout)
        steps.append(
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=hole, hole_width_range=hole, fill=0, p=1
            )
        )
    return A.Compose([*steps, ToTensorV2()])


class BatchTransform:
    """The transforms for a whole batch, in torch, on the device the batch is on.

    Called with uint8 images (N, 3, H, W) it gives float32 images of the same shape. Each image
    has draws of its own. `seed(n, epoch)` fixes the draws that follow; on another kind of device
    the same seed gives other draws. `sizes`: the side that the images are brought to at last in
    each epoch; () leaves them as they are. `padding_mode` and what follows it: as in
    `albumentations_pipeline`.
    """

    def __init__(
        self, mean, std, *, padding=4, padding_mode="constant", flip=0.5, rotation=0,
        brightness=0, cutout=8, sizes=(), augment=True,
    ):
        self.mean = torch.as_tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32).view(3, 1, 1)
        self.padding, self.flip, self.cutout, self.augment = padding, flip, cutout, augment
        self.rotation, self.brightness, self.sizes = rotation, brightness, sizes
        self.padding_mode = padding_mode
        self.seed(0)

    def seed(self, seed, epoch=0):
        self._seed, self._generator = seed, None
        self._size = self.sizes[epoch] if self.sizes else None

    def __call__(self, images):
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        if not self.augment:
            return self.normalize(images)
        if self._generator is None or self._generator.device != images.device:
            self._generator = torch.Generator(images.device).manual_seed(self._seed)
        images = random_crop(
            images, self.padding, self._generator, padding_mode=self.padding_mode
        )
        images = random_flip(images, self.flip, self._generator)
        if self.rotation:
            images = random_rotation(images.float(), self.rotation, self._generator)
        if self.brightness:
            images = random_brightness(images.float(), self.brightness, self._generator)
        images = cutout(self.normalize(images), self.cutout, self._generator)
        return resize(images, self._size) if self._size else images

    def normalize(self, images):
        """uint8 (N, 3, H, W) to float32 with mean 0 and deviation 1 over the data set."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def denormalize(self, images):
        """The inverse: normalised float images to float images in 0..1, for pictures."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images * std + mean).clamp(0, 1)


def resize(images, size):
    """Float (N, C, H, W) to (N, C, size, size), bilinear, averaged where it shrinks."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _draw(count, upper, like, generator):
    """`count` whole numbers from 0 to `upper`, both included, on the device of `like`."""
    return torch.randint(0, upper + 1, (count,), device=like.device, generator=generator)


def pad(images, padding, mode="constant"):
    """(N, C, H, W) with `padding` pixels more a side: black, or for "reflect" mirrored.

    As `F.pad` does it, which lacks "reflect" for uint8 on some devices. Raises InputError where
    an image is too small to be mirrored.
    """
    padded = F.pad(images, [padding] * 4).contiguous()
    if mode == "constant":
        return padded
    if padding >= min(images.shape[-2:]):
        size = "×".join(map(str, images.shape[-2:]))
        raise InputError(f"images of {size} pixels can't be mirrored by a padding of {padding}")
    for axis in (2, 3):
        lines = padded.transpose(0, axis)  # a view: rows, then columns
        for i in range(padding):
            lines[i] = lines[2 * padding - i]
            lines[-1 - i] = lines[-1 - 2 * padding + i]
    return padded


def random_crop(images, padding, generator=None, *, padding_mode="constant"):
    """Pads (N, C, H, W) by `padding` pixels a side and crops each image at its own offset."""
    n, channels, height, width = images.shape
    top = _draw(n, 2 * padding, images, generator).view(n, 1, 1)
    left = _draw(n, 2 * padding, images, generator).view(n, 1, 1)
    padded = pad(images, padding, padding_mode)
    # Row i of `rows` are the `width` pixels from pixel i on: a view, so that a crop is a choice
    # of rows, which is copied many times as fast as one pixel by pixel.
    rows = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    plane = torch.arange(n * channels, device=images.device).view(n, channels, 1)
    row = plane * (height + 2 * padding) + top + torch.arange(height, device=images.device)
    start = row * (width + 2 * padding) + left
    return rows.index_select(0, start.flatten()).view(images.shape)


def random_flip(images, probability, generator=None):
    """Mirrors each image of (N, C, H, W) left to right with that probability."""
    n = len(images)
    flipped = torch.rand(n, device=images.device, generator=generator) < probability
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(n, device=images.device) + n * flipped)


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
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
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


def cutout(images, size, generator=None):
    """Sets a `size`×`size` square of each image to 0, at a place of its own wholly inside.

    `images`: normalised float (N, C, H, W), contiguous, where 0 is the data set's mean; changed
    in place. Raises InputError where the square does not fit.
    """
    n, channels, height, width = images.shape
    if size > min(height, width):
        raise InputError(f"a cutout of {size} does not fit {height}×{width} pixels; lower it")
    top = _draw(n, height - size, images, generator).view(n, 1, 1, 1)
    left = _draw(n, width - size, images, generator).view(n, 1, 1, 1)
    plane = torch.arange(n * channels, device=images.device).view(n, channels, 1, 1)
    side = torch.arange(size, device=images.device)
    pixel = (plane * height + top + side.view(size, 1)) * width + left + side
    images.view(-1).index_fill_(0, pixel.flatten(), 0)
    return images
