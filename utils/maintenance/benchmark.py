"""Speeds side by side, in one run on this machine: `python -m utils.maintenance.benchmark`.

The rate of large matrix products, the input image by image and in batches, training as a
plain loop does it and as we do, and where the time of a step goes. The images are noise: speed
does not depend on what they show.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import pandas as pd
import torch
import tyro
from PIL import Image
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from utils import InputError, data, devices, files, plotting, run
from utils.batches import training_batches
from utils.maintenance import tables
from utils.models import CustomResNet, build
from utils.optimization import make_optimizer
from utils.progress import progress_bar
from utils.recipes import recipe
from utils.train import as_command

BATCH_SIZE = 256
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SINGLE, BATCHED = "input, one image at a time", "input, whole batches"
PLAIN, OURS = "training, plain", "training, ours"
LIGHTNING = "training, ours in Lightning"
KEPT = "training, freed memory given back", "training, freed memory kept"


@dataclass(frozen=True)
class Arguments:
    """Measures input and training side by side, and where the time of a step goes."""

    device: str | None = None
    """None: the best there is"""
    images: int = 1024
    """an epoch"""
    repeats: int = 2
    """epochs of each"""
    record: bool = False
    """keep the table, and a picture of where the time goes, in images/benchmark and the README"""

    def __post_init__(self):
        if self.images < 2 * BATCH_SIZE or self.repeats < 1:
            raise InputError("--images must be at least two batches, and --repeats at least 1")


def main(arguments=None):
    with as_command():
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.maintenance.benchmark")
        device = devices.pick_device(args.device)
        name = f"{devices.device_name(device)}, {devices.dtype_name(devices.amp_dtype(device))}"
        print(name, flush=True)
        table, phases = measure(device=device, images=args.images, repeats=args.repeats)
        print(table.to_string(index=False, float_format="{:,.2f}".format))
        if args.record:
            folder = tables.IMAGES / "benchmark"
            files.save_table(table.assign(device=name), folder / "speeds.csv")
            plotting.use_style()
            files.save_figure(plotting.time_by_phase(phases).figure, folder / "time_by_phase.png")
            tables.write()


def measure(*, device, images=1024, batch_size=BATCH_SIZE, repeats=2):
    """Everything, as a DataFrame: what, unit, median, lowest, highest; and `median_phases`."""
    dtype = devices.amp_dtype(device)
    pixels = noise(images)
    rows = []

    def add(what, unit, values, per=(1,), scale=1.0):
        middle = scale * statistics.median(values) / statistics.median(per)
        low, high = scale * min(values) / max(per), scale * max(values) / min(per)
        rows.append(dict(what=what, unit=unit, median=middle, lowest=low, highest=high))

    for kind in dict.fromkeys([torch.float32, dtype or torch.float32]):
        limit = matmul_rates(device, kind)
        add(f"matrix product, {devices.dtype_name(kind)}", "GFLOP/s", limit, scale=1e-9)
    speeds = input_speeds(noise(8 * images))  # short, so take more
    speeds |= training_speeds(
        pixels, device=device, dtype=dtype, batch_size=batch_size, repeats=repeats
    )
    for kept in (False, True):
        speeds[KEPT[kept]] = kept_speeds(
            kept, pixels, device=device, dtype=dtype, batch_size=batch_size, epochs=1 + repeats
        )
    for name, values in speeds.items():
        add(name, "images/s", values)
    add("whole batches over one image at a time", "times", speeds[BATCHED], speeds[SINGLE])
    add("our training over plain", "times", speeds[OURS], speeds[PLAIN])
    add("Lightning over our loop", "times", speeds[LIGHTNING], speeds[OURS])
    add("freed memory kept over given back", "times", speeds[KEPT[True]], speeds[KEPT[False]])
    flops = training_flops()
    add("our training over the matrix product", "times", speeds[OURS], limit, scale=flops)
    by_phase = step_phases(pixels, device=device, dtype=dtype, batch_size=batch_size)
    for name, phases in zip((PLAIN, OURS), by_phase.values(), strict=True):
        for phase, values in phases.items():
            add(f"{name}: {phase}", "ms/image", values)
    return pd.DataFrame(rows), median_phases(by_phase)


def noise(images):
    """An `ImageData` of that many training images, and ten test images, in CIFAR-10's form."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images) % 10
    classes = tuple("abcdefghij")
    return data.ImageData("noise", classes, pixels, labels, pixels[:10], labels[:10])


def matmul_rates(device, dtype):
    """FLOP/s of products of large square matrices."""
    size = 4096 if device.type == "cpu" else 8192
    factors = {name: torch.randn(size, size, device=device, dtype=dtype) for name in "ab"}
    timer = Timer("a @ b", globals=factors, num_threads=torch.get_num_threads())
    return [2 * size**3 / seconds for seconds in timer.blocked_autorange(min_run_time=2).times]


def input_speeds(images):
    """{name: [images/s of a pass over the training images]}, in this process, one thread."""
    settings, speeds = recipe("s10"), {}
    for name in (SINGLE, BATCHED):
        settings = settings.replace(per_image=name == SINGLE)
        batches = training_batches(settings, images, device=torch.device("cpu"), workers=0)
        timer = Timer("for _ in batches: pass", globals={"batches": batches}, num_threads=1)
        times = timer.blocked_autorange(min_run_time=2).times
        speeds[name] = [len(images.train_images) / seconds for seconds in times]
    return speeds


class PlainDataset(Dataset):
    """Image by image through torchvision's transforms, as most CIFAR-10 trainings do it."""

    def __init__(self, images):
        self.images = images.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.train_labels
        size = images.train_images.shape[-2:]
        square = 64 / size.numel()  # of 8×8
        self.transform = transforms.Compose([
            transforms.RandomCrop(size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(p=1, scale=(square, square), ratio=(1, 1), value=0),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_parts(images, *, device, batch_size, workers=0):
    """(loader, model, optimizer) of a plain training: contiguous tensors, float32, Adam."""
    loader = DataLoader(
        PlainDataset(images), batch_size=batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )
    model = CustomResNet(len(images.classes)).to(device)
    return loader, model, torch.optim.Adam(model.parameters(), lr=1e-3)


def plain_speeds(images, *, epochs, device, **settings):
    """Images/s of each epoch after the first of a plain training loop."""
    loader, model, optimizer = plain_parts(images, device=device, **settings)
    speeds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for pixels, labels in loader:
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        speeds.append(len(images.train_images) / (time.perf_counter() - start))
    return speeds[1:]


def training_speeds(images, *, device, dtype, batch_size, repeats):
    """{name: [images/s of each epoch after the first]}.

    The loops take turns, twice each, and run the whole of an epoch, input included.
    """
    epochs = 1 + repeats
    settings = recipe("s10").scaled(epochs=epochs, batch_size=batch_size)
    speeds = {PLAIN: [], OURS: [], LIGHTNING: []}
    for _ in progress_bar(range(2), desc="training"):
        workers = min(devices.cores(), 8)
        speeds[PLAIN] += plain_speeds(
            images, epochs=epochs, device=device, batch_size=batch_size, workers=workers
        )
        how = {"device": device, "dtype": dtype}
        speeds[OURS] += quiet_speeds(run.train_plain, settings, images, **how)
        with tempfile.TemporaryDirectory() as out:
            speeds[LIGHTNING] += quiet_speeds(
                run.train_lightning, settings, images, out=out, **how
            )
    return speeds


def quiet_speeds(train, settings, images, **how):
    """Images/s of each epoch after the first, without the table of epochs on the way."""
    with contextlib.redirect_stdout(io.StringIO()):
        _, history = train(settings, images, **how)
    return [row["images_per_s"] for row in history[1:]]


def kept_speeds(kept, images, *, epochs, batch_size, **how):
    """Images/s of each epoch after the first, with freed memory kept or given back.

    In a process of its own: the C library's defaults don't come back.
    """
    settings = recipe("s10").scaled(epochs=epochs, batch_size=batch_size)
    spawn, prepare = get_context("spawn"), devices.keep_memory if kept else None
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=prepare) as process:
        return process.submit(quiet_speeds, run.train_plain, settings, images, **how).result()


def phases(batches, model, optimizer, *, device, dtype=None, layout=torch.contiguous_format):
    """Milliseconds an image of "input", "forward", "backward" and "optimizer".

    A dict of lists, a value for each of at most five steps after the first. The device is waited
    for after each phase, which a training would not do.
    """
    model.train()
    times = {"input": [], "forward": [], "backward": [], "optimizer": []}
    marks = [time.perf_counter()]

    def mark():
        devices.synchronize(device)
        marks.append(time.perf_counter())

    for images, labels in itertools.islice(batches, 6):
        images, labels = images.to(device, memory_format=layout), labels.to(device)
        mark()
        with devices.autocast(device, dtype):
            loss = F.cross_entropy(model(images), labels)
        mark()
        optimizer.zero_grad()
        loss.backward()
        mark()
        optimizer.step()
        mark()
        for values, (before, after) in zip(times.values(), itertools.pairwise(marks), strict=True):
            values.append(1000 * (after - before) / len(labels))
        marks = marks[-1:]
    return {name: values[1:] for name, values in times.items()}


def step_phases(images, *, device, dtype=None, batch_size=256):
    """{"plain": …, "ours": …} of `phases` of both trainings on the images of an `ImageData`.

    Without workers, whose time would be hidden in the other phases.
    """
    settings = recipe("s10").scaled(batch_size=batch_size)
    model = build(settings, images).to(device)
    ours = training_batches(settings, images, device=device), model, make_optimizer(model, settings)
    plain = plain_parts(images, device=device, batch_size=batch_size)
    return {
        "plain": phases(*plain, device=device),
        "ours": phases(*ours, device=device, dtype=dtype, layout=torch.channels_last),
    }


def median_phases(by_phase):
    """`step_phases`, each list brought to its median, for `plotting.time_by_phase`."""
    return {
        name: {phase: statistics.median(values) for phase, values in times.items()}
        for name, times in by_phase.items()
    }


def training_flops():
    """FLOP of forward and backward for one image, counted by torch."""
    model = CustomResNet()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    main()
