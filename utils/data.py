"""Where images come from: CIFAR-10, a folder of pictures, or the built-in drawn sample.

All three give an `ImageData`.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from utils import InputError, sample
from utils.progress import progress_bar


@dataclass(frozen=True)
class ImageData:
    """Images uint8 (N, 3, H, W) and labels int64 (N,), for training and for the test.

    The validation images, where there are some, are set aside from the training images. `epochs`
    and `batch_size` are set where the data wants a schedule of its own (the sample).
    """

    name: str
    classes: tuple[str, ...]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    epochs: int | None = None
    batch_size: int | None = None
    validation_images: torch.Tensor | None = None
    validation_labels: torch.Tensor | None = None

    @property
    def size(self):
        """(height, width) of its images."""
        return tuple(self.test_images.shape[-2:])

    @cached_property
    def fingerprint(self):
        """Sixteen hexadecimal digits of the SHA-256 of training and test images and class names."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def statistics(self):
        """Mean and standard deviation of the training images, see `channel_statistics`."""
        return channel_statistics(self.train_images)

    def check_classes(self, classes):
        """Raises InputError where these, of trained weights, are not those of the images."""
        if self.classes != classes:
            raise InputError(
                f"the weights know the classes {', '.join(classes)}; {self.name} has "
                f"{', '.join(self.classes)}: choose weights and data that belong together"
            )

    def __str__(self):
        size = "×".join(map(str, self.size))
        training = f"{len(self.train_images):,} training"
        if self.validation_images is not None:
            training += f", {len(self.validation_images):,} validation"
        return (
            f"{self.name}: {training} and {len(self.test_images):,} test images of {size} pixels "
            f"in {len(self.classes)} classes"
        )


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


class Normalization:
    """uint8 images (N, 3, H, W) to float32 with mean 0 and deviation 1 over the data set.

    `mean`, `std`: of each channel, on the scale 0..1.
    """

    def __init__(self, mean, std):
        self.mean, self.std = (
            torch.as_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std)
        )

    def __call__(self, images):
        # copied to another device once: a copy in each step would wait for it
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def inverse(self, images):
        """Normalised float images to float images in 0..1, for pictures."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images * std + mean).clamp(0, 1)


def load(source="cifar10", *, root="data", train=True):
    """`ImageData` from "cifar10" (downloaded to `root` at first), "sample", or a folder's path.

    Without `train` a folder's training pictures are not read, which takes long: there are none.
    Raises InputError, in one line that names the mend, where that fails.
    """
    if source == "cifar10":
        return cifar10(root)
    if source == "sample":
        return builtin_sample()
    return image_folder(source, train=train)


def builtin_sample():
    """Ten classes of drawn shapes and textures, made from a seed: for tests and first steps."""
    name = "the built-in sample of drawn shapes (not CIFAR-10)"
    images = sample.draw_sample()
    return ImageData(name, sample.CLASSES, *images, sample.EPOCHS, sample.BATCH_SIZE)


def cifar10(root="data"):
    """CIFAR-10 through torchvision: 50,000 and 10,000 images, checked against their checksums.

    Downloads 170 MB at first. Raises InputError without a network or where a checksum fails.
    """
    from torchvision import datasets  # here, because it takes seconds

    try:
        splits = [datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 could not be downloaded ({' '.join(str(error).split())}); try again, or "
            "give --data a folder with train/<class>/* and test/<class>/*"
        ) from error
    tensors = []
    for split in splits:
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        tensors += [pixels, torch.tensor(split.targets)]
    return ImageData("CIFAR-10", tuple(splits[0].classes), *tensors)


def image_folder(path, *, train=True):
    """Pictures in `path`/train/<class>/* and `path`/test/<class>/*, all of one size.

    Any classes, the same in both. Without `train` there are no training images. Raises
    InputError where something is missing or broken.
    """
    from torchvision import datasets

    path = Path(path)
    if not path.is_dir():
        raise InputError(f"no folder {path}; give --data cifar10, sample or an existing folder")
    try:
        listings = {split: datasets.ImageFolder(path / split) for split in ("train", "test")}
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: train/ and test/ must each hold a folder of pictures for each class: {reason}"
        ) from error
    classes, others = (tuple(listing.classes) for listing in listings.values())
    if classes != others or len(classes) < 2:
        raise InputError(
            f"{path}: train/ and test/ must hold the same classes, at least two; train/ has "
            f"{', '.join(classes)}; test/ has {', '.join(others)}"
        )
    size = _read_picture(listings["train"].samples[0][0]).shape
    splits = []
    for split, listing in listings.items():
        count = len(listing) if train or split == "test" else 0
        names = [name for name, _ in listing.samples[:count]]
        splits.append(_read_pictures(names, size, split))
        splits.append(torch.tensor(listing.targets[:count], dtype=torch.int64))
    return ImageData(f"the folder {path.resolve().name}", classes, *splits)


def _read_pictures(names, size, split):
    """uint8 (N, 3, H, W). Threads help: decoding does not hold Python's lock."""
    images = np.empty((len(names), *size), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:  # after a bad picture the others are not read
        pictures = pool.map(partial(_read_picture, size=size), names)
        bar = progress_bar(pictures, total=len(names), desc=f"reading {split} pictures")
        for i, image in enumerate(bar):
            images[i] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _read_picture(name, size=None):
    with _opened(name) as picture:
        image = np.asarray(picture.convert("RGB"))
    if size and image.shape != size:
        raise InputError(
            f"{name} has {image.shape[1]}×{image.shape[0]} pixels, the first picture "
            f"{size[1]}×{size[0]}; bring all pictures to one size"
        )
    return image


@contextmanager
def _opened(name):
    """The picture, also to be decoded in the block. Raises InputError where that fails."""
    try:
        with Image.open(name) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the picture {name} can't be read; replace or delete it") from error


def read_picture(path, size):
    """A picture of any size as the network sees it, uint8 (3, H, W): its middle, resized.

    `size`: (height, width). Turned as the camera was held; what is transparent becomes white; of
    an animation the first picture. Raises InputError where it can't be read.
    """
    with _opened(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    whole = Image.alpha_composite(white, picture).convert("RGB")
    height, width = size
    return torch.from_numpy(np.array(ImageOps.fit(whole, (width, height)))).permute(2, 0, 1)


def halve(data):
    """The data at half the sides, each pixel the mean of four: a quarter of the work."""
    def smaller(images):
        return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)

    return replace(
        data, name=f"{data.name} at half its size",
        train_images=smaller(data.train_images), test_images=smaller(data.test_images),
    )


def validation_split(labels, *, fraction=0.1, seed=0):
    """Sorted indices int64 (training, validation): `fraction` of each class, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: round(fraction * len(members))]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def with_validation(data, *, fraction=0.1, seed=0):
    """The data with a validation split of its training images set aside; none for fraction 0.

    Raises InputError where all classes are too small for that.
    """
    if not fraction:
        return data
    train, validation = validation_split(data.train_labels, fraction=fraction, seed=seed)
    if not len(validation):
        raise InputError(
            f"{data.name} has too few training images to set {fraction:.0%} of each class aside; "
            "give more"
        )
    return replace(
        data,
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        validation_images=data.train_images[validation],
        validation_labels=data.train_labels[validation],
    )


HELD_OUT = ", tested on a held-out part of its training images"


def hold_out(data, *, fraction=0.1, seed=0):
    """The data with a validation split of its training images in the place of the test images."""
    split = with_validation(data, fraction=fraction, seed=seed)
    return replace(
        split,
        name=data.name + HELD_OUT,
        test_images=split.validation_images,
        test_labels=split.validation_labels,
        validation_images=None,
        validation_labels=None,
    )
