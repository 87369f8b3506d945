"""Where images come from: CIFAR-10, a folder of pictures, or the built-in drawn sample.

All three give an `ImageData`.
"""

import hashlib
import unicodedata
from concurrent.futures import ThreadPoolExecutor
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

RESIZE = "--resize 32 (in a notebook COURSE_RESIZE=32) takes the middle of each at 32×32"


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
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def statistics(self):
        """Mean and standard deviation of the training images, see `channel_statistics`.

        A channel that never changes counts as of deviation 1, by which it can be divided.
        """
        mean, std = channel_statistics(self.train_images)
        return mean, std.where(std > 0, 1)

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
    channels = images.transpose(0, 1).flatten(1)
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
        return (images / 255).sub_(self.mean).div_(self.std)

    def inverse(self, images):
        """Normalised float images to float images in 0..1, for pictures."""
        images = images * self.std.to(images.device) + self.mean.to(images.device)
        return images.clamp(0, 1)


def load(source="cifar10", *, root="data", train=True, resize=None):
    """`ImageData` from "cifar10" (downloaded to `root` at first), "sample", or a folder's path.

    Without `train` there are no training images; those of a folder, which take long, aren't read.
    `resize`: the side, or (height, width), to which the middle of each of its pictures is brought;
    None: all are of one size. Raises InputError, in one line that names the mend, where that fails.
    """
    size = (resize, resize) if isinstance(resize, int) else resize
    if size and min(size) < 8:
        raise InputError(f"pictures can't be resized to {min(size)} pixels; choose at least 8")
    if source not in ("cifar10", "sample"):
        return image_folder(source, train=train, size=size)
    images = cifar10(root) if source == "cifar10" else builtin_sample()
    if size not in (None, images.size):
        raise InputError(f"{images.name} is not resized; only the pictures of a folder are")
    if train:
        return images
    return replace(
        images, train_images=images.train_images[:0], train_labels=images.train_labels[:0]
    )


def builtin_sample():
    """Ten classes of drawn shapes and textures, made from a seed: for tests and first steps."""
    name = "the built-in sample of drawn shapes (not CIFAR-10)"
    images = sample.draw_sample()
    return ImageData(name, sample.CLASSES, *images, sample.EPOCHS, sample.BATCH_SIZE)


def cifar10(root):
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


def image_folder(path, *, train=True, size=None):
    """Pictures in `path`/train/<class>/* and `path`/test/<class>/*, of any classes.

    `size`: (height, width), see `read_picture`; None: they must all have the same. Without `train`
    there are no training images. What is hidden, or has no ending of a picture, is left out, and
    said. Raises InputError where something is missing or broken.
    """
    path = Path(path).expanduser()
    left_out = []
    try:
        splits = {split: _pictures_by_class(path / split, left_out) for split in ("train", "test")}
    except OSError as error:
        raise InputError(
            f"can't read {error.filename} ({error.strerror}); give --data cifar10, sample, or a "
            "folder with train/<class>/* and test/<class>/*"
        ) from error
    classes, others = (tuple(sorted(pictures)) for pictures in splits.values())
    if classes != others or len(classes) < 2:
        raise InputError(
            f"{path}: train/ and test/ must hold the same classes, at least two; train/ has "
            f"{', '.join(classes)}; test/ has {', '.join(others)}"
        )
    if left_out:
        print(f"left out {len(left_out)}: hidden, or not named as pictures, like", *left_out[:3])
    shape = read_picture(splits["train"][classes[0]][0], size).shape
    if not train:
        splits["train"] = dict.fromkeys(classes, [])
    tensors = []
    for split, pictures in splits.items():
        names = [name for each in classes for name in pictures[each]]
        counts = torch.tensor([len(pictures[each]) for each in classes])
        tensors += [
            _read_pictures(names, size, shape, split),
            torch.arange(len(classes)).repeat_interleave(counts),
        ]
    return ImageData(f"the folder {path.resolve().name}", classes, *tensors)


def _pictures_by_class(folder, left_out):
    """{class: paths of its pictures} in order; other paths are added to the list `left_out`."""
    endings = Image.registered_extensions()
    found = {}
    for place in sorted(folder.iterdir(), key=str):
        if place.name.startswith(".") or not place.is_dir():
            left_out.append(place)
            continue
        # an accented letter has two forms, and another system may have written the other one
        pictures = found.setdefault(unicodedata.normalize("NFC", place.name), [])
        for path in sorted(place.iterdir(), key=str):
            if path.suffix.lower() in endings and not path.name.startswith("."):
                pictures.append(path)
            else:
                left_out.append(path)
        if not pictures:
            raise InputError(f"{place} holds no pictures itself; put them there, or delete it")
    return found


def _read_pictures(names, size, shape, split):
    """uint8 (N, 3, H, W). Threads help: decoding does not hold Python's lock."""
    try:
        images = np.empty((len(names), *shape), dtype=np.uint8)
    except MemoryError as error:
        raise InputError(f"{len(names):,} pictures don't fit into memory; {RESIZE}") from error
    with ThreadPoolExecutor() as pool:
        pictures = progress_bar(
            pool.map(partial(read_picture, size=size), names), total=len(names),
            desc=f"reading {split} pictures",
        )
        for i, picture in enumerate(pictures):
            if picture.shape != shape:
                pool.shutdown(cancel_futures=True)  # the others are not read
                raise InputError(
                    f"{names[i]} has {picture.shape[2]}×{picture.shape[1]} pixels, the first "
                    f"picture {shape[2]}×{shape[1]}; {RESIZE}"
                )
            images[i] = picture
    return torch.from_numpy(images)


def read_picture(path, size=None):
    """A picture as the network sees it, uint8 (3, H, W): the same in training and when asked.

    `size`: (height, width) to which its middle is resized; None: all of it, as large as it is.
    Turned as the camera was held, white where it is transparent, of an animation the first
    picture. Grey values of 16 bits and floating-point ones of 0 to 1 are scaled to 8 bits, all
    opaque. Raises InputError where it can't be read.
    """
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(_prepared(picture, size))).permute(2, 0, 1)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no picture {path}; name one that exists") from error
    except Exception as error:  # a damaged file raises a dozen kinds, from OSError to RuntimeError
        raise InputError(
            f"{path} can't be read as a picture ({type(error).__name__}); replace or omit it"
        ) from error


def _prepared(picture, size):
    if size:  # a large JPEG is decoded at a fraction of its sides, in less time and memory
        picture.draft(None, (8 * max(size),) * 2)
    picture.getexif()  # keeps what it reads
    picture.info.pop("exif", None)  # would be written anew, which odd values forbid
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith(("I", "F")):  # I;16 among them
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return ImageOps.fit(picture, size[::-1]) if size else picture


def _eight_bits(picture):
    values = np.asarray(picture) / (1 if picture.mode == "F" else 65535)
    if not 0 <= values.min() <= values.max() <= 1:
        raise InputError(
            f"{picture.filename} has values that are not of 0 to 65535, or floats of 0 to 1; save "
            "it with 8 bits a channel"
        )
    return Image.fromarray((255 * values).round().astype(np.uint8))


def halve(data):
    """The data at half the sides, each pixel the mean of four: a quarter of the work."""
    def smaller(images):
        return images if images is None else F.avg_pool2d(images.float(), 2).round().to(torch.uint8)

    return replace(
        data, name=f"{data.name} at half its size",
        train_images=smaller(data.train_images), test_images=smaller(data.test_images),
        validation_images=smaller(data.validation_images),
    )


def validation_split(labels, fraction):
    """Which images are for validation, bool (N,): `fraction` of each class, always the same."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: round(fraction * len(members))]]] = True
    return chosen


def with_validation(data, *, fraction=0.1):
    """The data with a validation split of its training images set aside; none for fraction 0.

    Raises InputError where all classes are too small for that.
    """
    if not fraction:
        return data
    chosen = validation_split(data.train_labels, fraction)
    if not chosen.any():
        raise InputError(
            f"{data.name} has too few training images to set {fraction:.0%} of each class aside; "
            "give more"
        )
    return replace(
        data,
        train_images=data.train_images[~chosen],
        train_labels=data.train_labels[~chosen],
        validation_images=data.train_images[chosen],
        validation_labels=data.train_labels[chosen],
    )


def hold_out(data):
    """The data with a validation split of its training images in the place of the test images."""
    split = with_validation(data)
    return replace(
        split,
        name=f"{data.name}, whose test images are held-out training images",
        test_images=split.validation_images,
        test_labels=split.validation_labels,
        validation_images=None,
        validation_labels=None,
    )
