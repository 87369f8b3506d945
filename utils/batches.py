"""Batches of images float32 (B, 3, H, W) and labels int64 (B,), made from an `ImageData`.

Their order and their draws depend on the seed and the epoch alone: call `set_epoch` before each
epoch, and a resumed run goes on exactly as it would have. Several processes have shards of their
own: `rank` is the number of one of `processes`, from 0.
"""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import InputError
from utils.devices import cores
from utils.transforms import (
    BatchAugmentation,
    Normalization,
    albumentations_pipeline,
    random_flip,
)

EVALUATION_BATCH = 1000


def training_batches(recipe, images, *, seed=0, device, rank=0, processes=1, workers=None):
    """The augmented training images of an `ImageData`, as the recipe wants them.

    Whole batches are made on `device`, which holds all the images; for a recipe with `per_image`
    as many `workers` make them with albumentations (None: one a core, at most eight; 0: this
    process). Raises InputError for batches that can't be shared by the processes, or normalised.
    """
    batch_size, rest = divmod(recipe.batch_size, processes)
    if rest or batch_size < 2:
        raise InputError(
            f"{processes} processes can't share a batch of {recipe.batch_size} evenly, by at least "
            f"two images each; choose a --batch-size that is a larger multiple of {processes}"
        )
    pixels, labels = images.train_images, images.train_labels
    order = EpochOrder(len(labels), seed=seed, rank=rank, processes=processes)
    if recipe.sizes and images.size != (recipe.sizes[-1],) * 2:
        raise InputError(
            f"sizes {recipe.sizes} must end with the size of the test images, {images.size}; "
            f"give other --sizes, or --resize {recipe.sizes[-1]}"
        )
    smallest = min(recipe.sizes or images.size)
    if len(order) % batch_size == 1 and smallest < 16:  # an eighth of the side is left at the end
        raise InputError(
            f"the last batch is a single image of {smallest} pixels a side, which BatchNorm can't "
            "normalise; choose another --batch-size"
        )
    if recipe.per_image:
        pipeline = albumentations_pipeline(recipe, *images.statistics, size=pixels.shape[-2:])
        dataset = PerImageDataset(pixels, labels, pipeline)
        return PerImageBatches(dataset, order, batch_size=batch_size, workers=workers)
    pixels = pixels.to(device)
    if recipe.alternating_flip:
        generator = torch.Generator(device).manual_seed(seed)
        pixels = random_flip(pixels, recipe.flip, generator)
    augment = BatchAugmentation(recipe, *images.statistics)
    return Batches(pixels, labels.to(device), augment, order, batch_size=batch_size)


def evaluation_batches(images, split="test", *, statistics=None, device, rank=0, processes=1):
    """The test or validation images of an `ImageData` as they are, in their order, each once.

    Normalised by `statistics`; None: the mean and deviation of its training images. Of several
    processes each takes every n-th image, in as many batches as the others. Raises InputError
    for fewer images than processes.
    """
    pixels, labels = (getattr(images, f"{split}_{kind}") for kind in ("images", "labels"))
    if len(labels) < processes:
        raise InputError(f"{len(labels)} images can't be shared by {processes} processes")
    count = -(-len(labels) // (processes * EVALUATION_BATCH))
    shares = (x[rank::processes].to(device).tensor_split(count) for x in (pixels, labels))
    normalize = Normalization(*(statistics or images.statistics))
    return DataLoader(  # which does nothing but normalise each batch when its turn comes
        list(zip(*shares, strict=True)), batch_size=None, generator=torch.Generator(),
        collate_fn=lambda batch: (normalize(batch[0]), batch[1]),
    )


class EpochOrder(Sampler):
    """The order of `count` images in an epoch, drawn from `seed` and the epoch.

    The shards of all processes are equally long: where `count` can't be shared out evenly, some
    images come twice.
    """

    def __init__(self, count, *, seed=0, rank=0, processes=1):
        self.count, self.seed, self.rank, self.processes = count, seed, rank, processes
        self.epoch = 0

    def __len__(self):
        return -(-self.count // self.processes)

    def indices(self):
        """int64 (len,), on the CPU."""
        order, _ = np.random.SeedSequence((self.seed, self.epoch)).generate_state(2).tolist()
        generator = torch.Generator().manual_seed(order)
        # Recorded runs drew one number more, with which DataLoader seeds its workers.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order = torch.randperm(self.count, generator=generator)
        own = torch.arange(self.rank, len(self) * self.processes, self.processes)
        return order[own % self.count]

    def draws(self):
        """The seed of this process's augmentation in this epoch."""
        own = self.seed, self.epoch, self.rank  # zeros at the end count for nothing
        return np.random.SeedSequence(own).generate_state(2).tolist()[1]

    def __iter__(self):
        """What `PerImageDataset` is asked for."""
        draws = self.draws()
        return ((draws, index) for index in self.indices().tolist())


class Batches:
    """Whole batches, gathered and augmented on the device that holds all the images."""

    def __init__(self, images, labels, augment, order, *, batch_size):
        self.images, self.labels, self.augment = images, labels, augment
        self.order, self.batch_size = order, batch_size

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def set_epoch(self, epoch):
        """`epoch` counts from 0."""
        self.order.epoch = epoch

    def __iter__(self):
        generator = torch.Generator(self.images.device).manual_seed(self.order.draws())
        for chosen in self.order.indices().to(self.images.device).split(self.batch_size):
            images = self.images.index_select(0, chosen)  # many times as fast as brackets on CPUs
            images = self.augment(images, generator, self.order.epoch)
            yield images, self.labels.index_select(0, chosen)


class PerImageDataset(Dataset):
    """The albumentations data set: one image at a time through `pipeline`, on the CPU.

    It is asked for (seed, index), on which alone the draws depend. By itself albumentations
    repeats them in each worker process and in each epoch.
    """

    def __init__(self, images, labels, pipeline):
        # albumentations wants (H, W, 3) arrays
        self.images = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.pipeline = labels.cpu().numpy(), pipeline

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        # One after the other from the same source: Compose.set_random_seed would seed all
        # transforms alike, and a flip would tell where the crop is.
        generator = np.random.default_rng(key)
        numbers = random.Random(int(generator.integers(2**63)))
        for transform in self.pipeline.transforms:
            transform.set_random_state(generator, numbers)
        _, index = key
        return self.pipeline(image=self.images[index])["image"], self.labels[index]


class PerImageBatches(DataLoader):
    """Batches of a `PerImageDataset` by worker processes, which live as long as the loader."""

    def __init__(self, dataset, order, *, batch_size, workers=None):
        workers = min(cores(), 8) if workers is None else workers
        super().__init__(
            dataset, batch_size=batch_size, sampler=order, num_workers=workers,
            persistent_workers=workers > 0, generator=torch.Generator(), collate_fn=_arrays,
        )
        self.order = order

    def set_epoch(self, epoch):
        """`epoch` counts from 0."""
        self.order.epoch = epoch

    def __iter__(self):
        # Workers begin when the first batch is asked for: Lightning sets the epoch after `iter`.
        for images, labels in super().__iter__():
            yield torch.from_numpy(images), torch.from_numpy(labels)


def _arrays(samples):
    """A batch as a worker sends it: tensors would need shared memory, which is scarce in Docker."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).numpy(), np.stack(labels)
