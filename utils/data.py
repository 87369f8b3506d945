"""Where images come from: CIFAR-10, a folder of pictures, or the built-in drawn sample.

All three give an `ImageData`. `make_loader` turns images and labels into batches.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import datasets

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

    @cached_property
    def fingerprint(self):
        """Sixteen hexadecimal digits of the SHA-256 of all images, labels and class names."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    def __str__(self):
        size = "×".join(map(str, self.train_images.shape[-2:]))
        training = f"{len(self.train_images):,} training"
        if self.validation_images is not None:
            training += f", {len(self.validation_images):,} validation"
        return (
            f"{self.name}: {training} and {len(self.test_images):,} test images of {size} pixels "
            f"in {len(self.classes)} classes"
        )


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
    return ImageData(
        "the built-in sample of drawn shapes (not CIFAR-10)",
        sample.CLASSES,
        *sample.draw_sample(),
        epochs=sample.EPOCHS,
        batch_size=sample.BATCH_SIZE,
    )


def cifar10(root="data"):
    """CIFAR-10 through torchvision: 50,000 and 10,000 images, checked against their checksums.

    Downloads 170 MB at first. Raises InputError without a network or where a checksum fails.
    """
    folder = Path(root) / datasets.CIFAR10.base_folder
    try:
        datasets.CIFAR10(root, train=False)
    except RuntimeError:  # not there, or not as it should be
        _download_cifar10(Path(root), folder)
    splits = []
    for train in (True, False):
        split = datasets.CIFAR10(root, train=train)
        splits.append(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous())
        splits.append(torch.tensor(split.targets))
    return ImageData("CIFAR-10", tuple(split.classes), *splits)


def _download_cifar10(root, folder):
    """Into a temporary folder first: a download that was cut off leaves nothing behind."""
    mend = "try again, or give --data a folder with train/<class>/* and test/<class>/*"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            datasets.CIFAR10(temporary, download=True)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(Path(temporary) / folder.name, folder)
    except (OSError, HTTPException) as error:
        raise InputError(f"CIFAR-10 could not be downloaded ({error}); {mend}") from error
    except RuntimeError as error:
        raise InputError(f"the download of CIFAR-10 failed its checksum; {mend}") from error
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            root.rmdir()


def image_folder(path, *, train=True):
    """Pictures in `path`/train/<class>/* and `path`/test/<class>/*, all of one size.

    Any classes, the same in both. Without `train` there are no training images. Raises
    InputError where something is missing or broken.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"no folder {path}; give --data cifar10, sample or an existing folder")
    listings = {}
    for split in ("train", "test"):
        try:
            listings[split] = datasets.ImageFolder(path / split)
        except FileNotFoundError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path / split} must hold a folder of pictures for each class: {reason}"
            ) from error
    classes, others = (listings[split].classes for split in ("train", "test"))
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise InputError(
            f"{path}: classes in only one of train/ and test/: {', '.join(odd)}; "
            "give both the same class folders"
        )
    size = _read_picture(listings["train"].samples[0][0]).shape
    splits = []
    for split, listing in listings.items():
        count = len(listing) if train or split == "test" else 0
        names = [name for name, _ in listing.samples[:count]]
        splits.append(_read_pictures(names, size, split))
        splits.append(torch.tensor(listing.targets[:count], dtype=torch.int64))
    return ImageData(f"the folder {path.name}", tuple(classes), *splits)


def _read_pictures(names, size, split):
    """uint8 (N, 3, H, W). Threads help: decoding does not hold Python's lock."""
    images = np.empty((len(names), *size), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(_read_picture, names)
        bar = progress_bar(pictures, total=len(names), desc=f"reading {split} pictures")
        for i, image in enumerate(bar):
            if image.shape != size:
                raise InputError(
                    f"{names[i]} has {image.shape[1]}×{image.shape[0]} pixels, the first picture "
                    f"{size[1]}×{size[0]}; bring all pictures to one size"
                )
            images[i] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _read_picture(name):
    try:
        with Image.open(name) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the picture {name} can't be read; replace or delete it") from error


def fingerprints(images):
    """Of each image of uint8 (N, 3, H, W) sixteen hexadecimal digits of its bytes' SHA-256."""
    images = images.cpu().contiguous().numpy()
    return [hashlib.sha256(image).hexdigest()[:16] for image in images]


def read_fingerprints(path):
    """The set of fingerprints in a text file: one a line; what follows a "#" is a comment.

    Raises InputError where the file can't be read or a line is something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}; give a text file of fingerprints") from error
    found = {line.partition("#")[0].strip() for line in lines} - {""}
    for line in found:
        if not re.fullmatch("[0-9a-f]{16}", line):
            raise InputError(f"{path}: {line!r} is no fingerprint of 16 hexadecimal digits")
    return found


def validation_split(labels, *, fraction=0.1, seed=0):
    """Indices (training, validation), both sorted: `fraction` of each class, drawn by `seed`."""
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


class BatchDataset(Dataset):
    """Gives whole batches: DataLoader hands `__getitems__` all of a batch's indices at once.

    `transform`, a `BatchTransform`, works on the device that the images are on.
    """

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        images, labels = self.gather(indices)
        return self.transform(images), labels

    def gather(self, indices):
        indices = torch.as_tensor(indices, device=self.images.device)
        # on CPUs many times as fast as square brackets
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def seed(self, seed, epoch=0):
        self.transform.seed(seed, epoch)


class RawBatchDataset(BatchDataset):
    """Gives the batches as they are: for a loop that transforms them later, on its own device."""

    def __getitems__(self, indices):
        return self.gather(indices)


class PerImageDataset(Dataset):
    """The albumentations data set: one image at a time through `transform`, on the CPU."""

    def __init__(self, images, labels, transform):
        # albumentations wants (H, W, 3) arrays
        self.images = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = labels.cpu(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(image=self.images[index])["image"], self.labels[index]

    def seed(self, seed, epoch=0):
        self.transform.set_random_seed(seed % 2**32)


def _seed_worker(_):
    """albumentations keeps its own random state: without this all workers draw the same."""
    info = get_worker_info()
    info.dataset.seed(info.seed)


class EpochLoader(DataLoader):
    """A DataLoader whose order and augmentations depend on the seed and the epoch alone.

    Call `set_epoch` before each epoch; a resumed run then goes on exactly as it would have.
    With the per-image data set they depend on the number of worker processes as well.
    """

    def __init__(self, dataset, *, seed=0, **settings):
        self.seed = seed
        super().__init__(dataset, generator=torch.Generator(), **settings)
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """`epoch` counts from 0."""
        order, draws = np.random.SeedSequence((self.seed, epoch)).generate_state(2).tolist()
        self.generator.manual_seed(order)  # the sampler's, and the source of the workers' seeds
        self.dataset.seed(draws, epoch)

    def __iter__(self):
        # A generator, so that nothing is drawn before the first batch is asked for: Lightning
        # makes its iterator before the hook in which it can call `set_epoch`.
        yield from super().__iter__()


def cores():
    """How many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_loader(
    images, labels, transform, *, batch_size, shuffle=False, sampler=None, seed=0, workers=None,
    raw=False,
):
    """Batches of images float32 (B, 3, H, W) and labels int64 (B,); the last may be shorter.

    With a `BatchTransform`, batches are made on the device of `images`, in this process. With
    an albumentations pipeline they are made by `workers` processes (None: one a core, at most
    eight; 0: this process). With `raw` whole batches stay uint8, for a later `transform`.
    """
    settings = {"batch_size": batch_size, "shuffle": shuffle, "sampler": sampler, "seed": seed}
    if hasattr(transform, "set_random_seed"):
        if workers is None:
            workers = min(cores(), 8)
        return EpochLoader(
            PerImageDataset(images, labels, transform), **settings,
            num_workers=workers, worker_init_fn=_seed_worker,
        )
    dataset = (RawBatchDataset if raw else BatchDataset)(images, labels, transform)
    return EpochLoader(dataset, **settings, collate_fn=_as_is)


def _as_is(batch):
    return batch
