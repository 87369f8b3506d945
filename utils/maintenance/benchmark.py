"""Speeds side by side, in one run on this machine: `python -m utils.maintenance.benchmark`.

The rate of large matrix products, training as a plain loop does it and as we do, and where the
time of a step goes. The images are noise: speed does not depend on what they show.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
import tyro
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from utils import InputError, data, devices, files, plotting, run
from utils.batches import training_batches
from utils.maintenance import tables
from utils.models import CustomResNet, build
from utils.optimization import make_optimizer
from utils.progress import progress_bar
from utils.recipes import recipe
from utils.train import as_command

BATCH_SIZE = recipe("s10").batch_size
PLAIN = "training, plain"
OURS = "training, ours"
LIGHTNING = "training, ours in Lightning"
GIVEN_BACK = "training, ours, freed memory given back"


@dataclass(frozen=True)
class Arguments:
    """Measures trainings side by side, and where the time of a step goes."""

    device: str | None = None
    """None: the best there is"""
    repeats: int = 2
    """epochs of each"""
    record: bool = False
    """keep the table, and a picture of where the time goes, in images/benchmark and the README"""

    def __post_init__(self):
        if self.repeats < 1:
            raise InputError("--repeats must be at least 1")


def main(arguments=None):
    with as_command():
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.maintenance.benchmark")
        device = devices.pick_device(args.device)
        name = f"{devices.device_name(device)}, {devices.dtype_name(devices.amp_dtype(device))}"
        print(name)
        batches = 3 if device.type == "cpu" else 50
        table, by_phase = measure(
            device=device, images=batches * BATCH_SIZE, repeats=args.repeats
        )
        print(table.to_string(index=False, float_format="{:,.2f}".format))
        if args.record:
            folder = tables.IMAGES / "benchmark"
            files.save_table(table.assign(device=name), folder / "speeds.csv")
            plotting.use_style()
            files.save_figure(plotting.time_by_phase(by_phase).figure, folder / "time_by_phase.png")
            tables.write()


def measure(*, device, images, repeats):
    """Everything, as a DataFrame: what, unit, median, lowest, highest; and `median_phases`."""
    dtype = devices.amp_dtype(device)
    pixels = noise(images)
    how = {"device": device, "dtype": dtype}
    rows = []

    def add(what, unit, values, per=(1,)):
        rows.append({
            "what": what, "unit": unit,
            "median": statistics.median(values) / statistics.median(per),
            "lowest": min(values) / max(per), "highest": max(values) / min(per),
        })

    product = own_process(None, matmul_rates, device, dtype)
    add(f"matrix product, {devices.dtype_name(dtype)}", "GFLOP/s", product)
    speeds = training_speeds(pixels, epochs=1 + repeats, **how)
    for name, values in speeds.items():
        add(name, "images/s", values)
    add("our training over plain", "times", speeds[OURS], speeds[PLAIN])
    add("Lightning over our loop", "times", speeds[LIGHTNING], speeds[OURS])
    add("freed memory kept over given back", "times", speeds[OURS], speeds[GIVEN_BACK])
    rates = [speed * training_flops() / 1e9 for speed in speeds[OURS]]
    add("our training over the matrix product", "times", rates, product)
    by_phase = step_phases(pixels, **how)
    for way, times in by_phase.items():
        for phase, values in times.items():
            add(f"training, {way}: {phase}", "ms/image", values)
    return pd.DataFrame(rows), median_phases(by_phase)


def noise(images):
    """An `ImageData` of that many training images, and ten test images, in CIFAR-10's form."""
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(images) % 10
    return data.ImageData("noise", (*"abcdefghij",), pixels, labels, pixels[:10], labels[:10])


def matmul_rates(device, dtype):
    """GFLOP/s of products of large square matrices, in a process of its own; None: in float32.

    So large that waiting for each counts for nothing. In float32 they are as precise as
    convolutions are.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = 4096 if device.type == "cpu" else 16384
    factors = {name: torch.randn(size, size, device=device, dtype=dtype) for name in "ab"}
    timer = Timer(
        "a @ b", globals=factors, num_threads=torch.get_num_threads(),
        timer=partial(devices.clock, device),
    )
    times = timer.blocked_autorange(min_run_time=2).times
    return [2e-9 * size**3 / seconds for seconds in times]


class PlainDataset(datasets.CIFAR10):
    """Image by image through torchvision's transforms, as most CIFAR-10 trainings do it."""

    def __init__(self, images):
        self.data = images.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = images.train_labels
        self.target_transform = None
        size = images.train_images.shape[-2:]
        self.transform = transforms.Compose([
            transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize([0.5], [0.25]),
            transforms.RandomErasing(p=1, scale=[64 / size.numel()] * 2, ratio=(1, 1)),  # of 8×8
        ])


def plain_parts(settings, images, device, workers=0):
    """(loader, model, optimizer) of a plain training: contiguous tensors, float32, Adam."""
    loader = torch.utils.data.DataLoader(
        PlainDataset(images), settings.batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )
    model = CustomResNet(len(images.classes)).to(device)
    return loader, model, torch.optim.Adam(model.parameters(), lr=1e-3)


def plain_training(settings, images, *, device, dtype=None):
    """A plain training loop, in float32 whatever `dtype`. Returns what `run.train_plain` does."""
    loader, model, optimizer = plain_parts(settings, images, device, min(devices.cores(), 8))
    history = []
    for _ in range(settings.epochs):
        start = time.perf_counter()
        for pixels, labels in loader:
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        history.append({"images_per_s": len(loader.dataset) / (time.perf_counter() - start)})
    return model, history


def training_speeds(images, *, epochs, **how):
    """{name: [images/s of each epoch after the first]}, the whole of an epoch, input included.

    The trainings take turns, twice each.
    """
    settings = recipe("s10").scaled(epochs=epochs)
    speeds = {PLAIN: [], OURS: [], LIGHTNING: [], GIVEN_BACK: []}
    for name in progress_bar(2 * list(speeds), desc="training"):
        with tempfile.TemporaryDirectory() as out:
            prepare, train = {
                PLAIN: (None, plain_training),
                OURS: (devices.prepare, run.train_plain),
                LIGHTNING: (devices.prepare, partial(run.train_lightning, out=out)),
                GIVEN_BACK: (partial(devices.prepare, keep=False), run.train_plain),
            }[name]
            speeds[name] += own_process(prepare, epoch_speeds, train, settings, images, **how)
    return speeds


def epoch_speeds(train, *args, **how):
    """Images/s of each epoch after the first, without the table of epochs on the way."""
    with contextlib.redirect_stdout(io.StringIO()):
        _, history = train(*args, **how)
    return [row["images_per_s"] for row in history[1:]]


def own_process(prepare, function, *args, **how):
    """What `function` returns in a process of its own, after `prepare`, or None for nothing.

    For what a training sets up can't be undone in a process.
    """
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"), prepare) as process:
        return process.submit(function, *args, **how).result()


def our_parts(settings, images, device):
    """(batches, model, optimizer) of a training by `run.train_plain`."""
    model = build(settings, images).to(device)
    batches = training_batches(settings, images, device=device)
    return batches, model, make_optimizer(model, settings)


def phases(parts, *args, device, dtype=None, layout=torch.contiguous_format):
    """Milliseconds an image of "input", "forward", "backward" and "optimizer".

    `parts`: a function that gives batches, model and optimizer. Returns a dict of lists, a value
    for each of at most five steps after the first. The device is waited for after each phase,
    which a training would not do.
    """
    batches, model, optimizer = parts(*args, device)
    times = {}
    marks = [devices.clock(device)]

    def done(phase):
        marks.append(devices.clock(device))
        times.setdefault(phase, []).append(1000 * (marks[-1] - marks[-2]) / len(labels))

    for images, labels in itertools.islice(batches, 6):
        images, labels = images.to(device, memory_format=layout), labels.to(device)
        done("input")
        with devices.autocast(device, dtype):
            loss = F.cross_entropy(model(images), labels)
        done("forward")
        optimizer.zero_grad()
        loss.backward()
        done("backward")
        optimizer.step()
        done("optimizer")
    return {phase: values[1:] for phase, values in times.items()}


def step_phases(images, *, device, dtype=None, batch_size=None):
    """{"plain": …, "ours": …} of `phases` on an `ImageData`, each in a process of its own.

    Plain in float32 whatever `dtype`, and without workers, whose time would be hidden in the
    other phases. `batch_size`: None for the recipe's.
    """
    settings = recipe("s10").scaled(batch_size=batch_size)
    return {
        "plain": own_process(None, phases, plain_parts, settings, images, device=device),
        "ours": own_process(
            devices.prepare, phases, our_parts, settings, images, device=device, dtype=dtype,
            layout=torch.channels_last,
        ),
    }


def median_phases(by_phase):
    """`step_phases`, each list brought to its median, for `plotting.time_by_phase`."""
    return pd.DataFrame(by_phase).map(statistics.median).to_dict()


def training_flops():
    """FLOP of forward and backward for one image, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        CustomResNet()(torch.zeros(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    main()
