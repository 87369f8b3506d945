"""Speeds side by side, in one run on this machine: `python -m utils.benchmark`.

The rate of large matrix products, the input image by image and in batches, training as a
plain loop does it and as we do, and where the time of a step goes. The images are noise: speed
does not depend on what they show.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from utils import InputError, data, plotting, train, training
from utils.models import CustomResNet
from utils.progress import progress_bar
from utils.recipes import recipe
from utils.transforms import BatchTransform, albumentations_pipeline

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SINGLE, BATCHED = "input, one image at a time", "input, whole batches"
PLAIN, OURS, COMPILED = "training, plain", "training, ours", "training, ours compiled"
LIGHTNING = "training, ours in Lightning"


def noise(images):
    """An `ImageData` of that many training images, and ten test images, in CIFAR-10's form."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images) % 10
    classes = tuple("abcdefghij")
    return data.ImageData("noise", classes, pixels, labels, pixels[:10], labels[:10])


def matmul_rates(device, dtype, *, repeats):
    """FLOP/s of each of `repeats` products of large square matrices, at the best of two sizes."""
    rates = {}
    for size in (2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            a @ b
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates[size] = [2 * size**3 / seconds for seconds in times[1:]]
    return max(rates.values(), key=statistics.median)


def synchronize(device):
    """Waits until the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def input_speeds(images, *, repeats):
    """{name: [images/s of each pass over the training images]}, in this process, one thread."""
    loaders = {
        SINGLE: albumentations_pipeline(MEAN, STD), BATCHED: BatchTransform(MEAN, STD),
    }
    speeds = {name: [] for name in loaders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for round_ in range(1 + repeats):
        for name, transform in loaders.items():
            loader = data.make_loader(
                images.train_images, images.train_labels, transform, batch_size=512,
                shuffle=True, workers=0,
            )
            start = time.perf_counter()
            for _ in loader:
                pass
            if round_:  # the first warms up
                speeds[name].append(len(images.train_images) / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return speeds


class PlainDataset(Dataset):
    """Image by image through torchvision's transforms, as most CIFAR-10 trainings do it."""

    def __init__(self, images):
        self.images = images.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.train_labels
        size = images.train_images.shape[-2:]
        square = 64 / size.numel()
        self.transform = transforms.Compose([
            transforms.RandomCrop(size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            # a square of 8×8
            transforms.RandomErasing(p=1, scale=(square, square), ratio=(1, 1), value=0),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_parts(images, *, device, batch_size, workers):
    """(loader, model, optimizer) of a plain training: contiguous tensors, float32, Adam."""
    loader = DataLoader(
        PlainDataset(images), batch_size=batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )
    model = CustomResNet(len(images.classes)).to(device)
    return loader, model, torch.optim.Adam(model.parameters(), lr=1e-3)


def our_parts(images, *, device, batch_size):
    """(loader, model, optimizer) of recipe `s10`."""
    settings = recipe("s10").scaled(batch_size=batch_size)
    loader, _ = training.make_loaders(settings, images, device=device)
    model = train.new_model(settings, images).to(device)
    return loader, model, training.make_optimizer(model, settings)


def plain_speeds(images, *, epochs, **settings):
    """Images/s of each epoch after the first of a plain training loop."""
    loader, model, optimizer = plain_parts(images, **settings)
    device = settings["device"]
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


def training_speeds(images, *, device, dtype, batch_size, workers, compiled, repeats):
    """({name: [images/s of each epoch after the first]}, seconds of compilation).

    The loops take turns, twice each, and run the whole of an epoch, input included.
    """
    settings = recipe("s10").scaled(epochs=1 + repeats, batch_size=batch_size)
    how = {"device": device, "dtype": dtype}
    speeds = {name: [] for name in (PLAIN, OURS, *([COMPILED] if compiled else []), LIGHTNING)}
    warm_up = 0.0
    for _ in progress_bar(range(2), desc="training"):
        speeds[PLAIN] += plain_speeds(
            images, epochs=1 + repeats, device=device, batch_size=batch_size, workers=workers
        )
        # the others print a table of epochs, which says nothing here
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            *_, history = train.train(settings, images, **how)
            speeds[OURS] += history.column("images_per_s")[1:]
            if compiled:
                *_, history = train.train(settings, images, compiled=True, **how)
                speeds[COMPILED] += history.column("images_per_s")[1:]
                warm_up = max(warm_up, history.warm_up_seconds)
            *_, history = train.train_lightning(settings, images, out=out, **how)
            speeds[LIGHTNING] += history.column("images_per_s")[1:]
    return speeds, warm_up


def phases(
    loader, model, optimizer, *, device, dtype=None, memory_format=torch.contiguous_format, steps=5
):
    """Milliseconds an image of "input", "forward", "backward" and "optimizer".

    A dict of lists, a value for each of `steps` steps after the first. The device is waited for
    after each phase, which a training would not do.
    """
    model.train()
    times = {"input": [], "forward": [], "backward": [], "optimizer": []}
    marks = [time.perf_counter()]

    def mark():
        synchronize(device)
        marks.append(time.perf_counter())

    for images, labels in itertools.islice(loader, 1 + steps):
        images = images.to(device, memory_format=memory_format)
        labels = labels.to(device)
        mark()
        with training.autocast(device, dtype):
            loss = F.cross_entropy(model(images), labels)
        mark()
        optimizer.zero_grad()
        loss.backward()
        mark()
        optimizer.step()
        mark()
        for i, name in enumerate(times):
            times[name].append(1000 * (marks[i + 1] - marks[i]) / len(labels))
        marks = marks[-1:]
    return {name: values[1:] for name, values in times.items()}


def step_phases(images, *, device, dtype=None, batch_size=256, workers=0):
    """{"plain": …, "ours": …} of `phases` of both trainings on the images of an `ImageData`."""
    plain = plain_parts(images, device=device, batch_size=batch_size, workers=workers)
    ours = our_parts(images, device=device, batch_size=batch_size)
    return {
        "plain": phases(*plain, device=device),
        "ours": phases(*ours, device=device, dtype=dtype, memory_format=torch.channels_last),
    }


def median_phases(images, **settings):
    """`step_phases`, each list brought to its median, for `plotting.time_by_phase`."""
    return {
        name: {phase: statistics.median(values) for phase, values in times.items()}
        for name, times in step_phases(images, **settings).items()
    }


def training_flops():
    """FLOP of forward and backward for one image, counted by torch."""
    model = CustomResNet()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


def step_memory(model, optimizer, images, *, dtype=None):
    """Bytes that a training step on `images` (B, 3, 32, 32) needs at its peak.

    On CUDA the allocator's peak; elsewhere counted: weights, gradients, the optimizer's state and
    what the forward pass keeps for the backward pass.
    """
    device = images.device
    kept = {}  # by address, since a tensor may be kept more than once

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    for _ in range(2):  # the first makes the optimizer's state
        kept.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with keeping, training.autocast(device, dtype):
            loss = model(images).sum()
        for parameter in model.parameters():
            keep(parameter)
        total = sum(kept.values())
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for parameter in model.parameters():
        state = filter(torch.is_tensor, optimizer.state[parameter].values())
        total += sum(tensor.nbytes for tensor in (parameter.grad, *state))
    return total


def measure(*, device, images=1024, batch_size=256, repeats=2, workers=None, compiled=False):
    """Everything that the benchmark measures, as rows: what, unit, median, lowest, highest."""
    dtype = training.amp_dtype(device)
    if workers is None:
        workers = min(data.cores(), 8)
    noise_images = noise(images)
    rows = []

    def add(what, unit, values):
        rows.append({
            "what": what, "unit": unit, "median": statistics.median(values),
            "lowest": min(values), "highest": max(values),
        })

    def add_ratio(what, over, under, scale=1.0):
        rows.append({
            "what": what, "unit": "times", "median": scale * statistics.median(over)
            / statistics.median(under), "lowest": scale * min(over) / max(under),
            "highest": scale * max(over) / min(under),
        })

    rates = {
        kind: matmul_rates(device, kind, repeats=repeats)
        for kind in dict.fromkeys([torch.float32, dtype or torch.float32])
    }
    inputs = input_speeds(noise(8 * images), repeats=repeats)  # short, so take more
    speeds, warm_up = training_speeds(
        noise_images, device=device, dtype=dtype, batch_size=batch_size, workers=workers,
        compiled=compiled, repeats=repeats,
    )
    for kind, values in rates.items():
        add(f"matrix product, {str(kind)[6:]}", "GFLOP/s", [v / 1e9 for v in values])
    for name, values in (inputs | speeds).items():
        add(name, "images/s", values)
    if compiled:
        add("compilation", "s", [warm_up])
    add_ratio("whole batches over one image at a time", inputs[BATCHED], inputs[SINGLE])
    add_ratio("our training over plain", speeds[OURS], speeds[PLAIN])
    add_ratio("Lightning over our loop", speeds[LIGHTNING], speeds[OURS])
    limit = rates[dtype or torch.float32]
    add_ratio("our training over the matrix product", speeds[OURS], limit, training_flops())

    settings = {"device": device, "batch_size": batch_size}
    # without workers, whose time would be hidden in the other phases
    by_phase = step_phases(noise_images, dtype=dtype, workers=0, **settings)
    for name, times in zip((PLAIN, OURS), by_phase.values(), strict=True):
        for phase, values in times.items():
            add(f"{name}: {phase}", "ms/image", values)
    pixels = torch.zeros(batch_size, 3, 32, 32, device=device)
    _, *parts = plain_parts(noise_images, workers=0, **settings)
    add(f"{PLAIN}: memory", "MiB", [step_memory(*parts, pixels) / 2**20])
    del parts  # so that they don't count below
    _, *parts = our_parts(noise_images, **settings)
    add(f"{OURS}: memory", "MiB", [step_memory(*parts, pixels, dtype=dtype) / 2**20])
    return rows


def phases_of(rows):
    """{"plain": {"input": ms, …}, "ours": …} for `plotting.time_by_phase`, of `measure`'s rows."""
    found = {}
    for row in rows:
        if row["unit"] == "ms/image":
            name, phase = row["what"].removeprefix("training, ").split(": ")
            found.setdefault(name, {})[phase] = float(row["median"])
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark", description=__doc__)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--images", type=int, default=1024, help="an epoch (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--repeats", type=int, default=2, help="epochs of each (default: 2)")
    parser.add_argument(
        "--workers", type=int, help="of the plain loop's loader (default: a core each, at most 8)"
    )
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--csv", metavar="FILE", help="also write the table to this file")
    parser.add_argument("--figure", metavar="FILE", help="also draw where the time goes (PNG)")
    args = parser.parse_args()
    plt.switch_backend("Agg")
    try:
        _run(args)
    except InputError as error:
        sys.exit(f"error: {error}")


def _run(args):
    if args.images < 2 * args.batch_size or args.repeats < 1:
        raise InputError("--images must be at least two batches, and --repeats at least 1")
    device = training.pick_device(args.device)
    name = f"{training.device_name(device)}, {str(training.amp_dtype(device) or torch.float32)[6:]}"
    print(name, flush=True)
    rows = measure(
        device=device, images=args.images, batch_size=args.batch_size, repeats=args.repeats,
        workers=args.workers, compiled=args.compile,
    )
    print(f"{'':44}{'median':>10}{'lowest':>10}{'highest':>10}")
    for row in rows:
        digits = 2 if row["unit"] in ("times", "ms/image") else 0
        numbers = "".join(f"{row[name]:10,.{digits}f}" for name in ("median", "lowest", "highest"))
        print(f"{row['what']:44}{numbers}  {row['unit']}")
    if args.csv:
        training.write_csv([{"device": name, **row} for row in rows], args.csv)
    if args.figure:
        plotting.use_style()
        plotting.time_by_phase(phases_of(rows))
        with training.whole_file(args.figure) as part:
            plt.savefig(part, format="png")


if __name__ == "__main__":
    sys.exit(main())
