"""Speeds side by side, in one run on this machine: `python -m utils.benchmark`.

Images/s of the input (albumentations image by image, torch batch by batch, one thread each) and of
training recipe `s10` in both loops. The images are noise: speed does not depend on what they show.
"""

import argparse
import contextlib
import csv
import io
import statistics
import sys
import tempfile
import time

import torch

from utils import data, train, training
from utils.recipes import recipe
from utils.transforms import BatchTransform, albumentations_pipeline


def noise(images):
    """An `ImageData` of that many training images, and ten test images, in CIFAR-10's form."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images) % 10
    classes = tuple("abcdefghij")
    return data.ImageData("noise", classes, pixels, labels, pixels[:10], labels[:10])


def input_speeds(images, *, repeats):
    """{name: [images/s of each pass over the training images]}, in this process, one thread."""
    statistics_ = (torch.full((3,), 0.5), torch.full((3,), 0.25))
    loaders = {
        "input, one image at a time (albumentations)": albumentations_pipeline(*statistics_),
        "input, whole batches (torch)": BatchTransform(*statistics_),
    }
    speeds = {name: [] for name in loaders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        for name, transform in loaders.items():
            loader = data.make_loader(
                images.train_images, images.train_labels, transform, batch_size=512,
                shuffle=True, workers=0,
            )
            start = time.perf_counter()
            for _ in loader:
                pass
            speeds[name].append(len(images.train_images) / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return speeds


def loop_speeds(images, *, device, dtype, batch_size, repeats):
    """{name: [images/s of each epoch after the first]}; the loops take turns, twice each."""
    settings = recipe("s10").scaled(epochs=1 + repeats, batch_size=batch_size)
    plain, lightning = "training, plain loop", "training, Lightning"
    speeds = {plain: [], lightning: []}
    for _ in range(2):
        # both print a table of epochs, which says nothing here
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            *_, history = train.train(settings, images, device=device, dtype=dtype)
            speeds[plain] += history.column("images_per_s")[1:]
            *_, history = train.train_lightning(
                settings, images, device=device, dtype=dtype, out=out
            )
            speeds[lightning] += history.column("images_per_s")[1:]
    return speeds


def main():
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark", description=__doc__)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--images", type=int, default=2048, help="an epoch (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--csv", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args()
    device = training.pick_device(args.device)
    dtype = training.amp_dtype(device)
    images = noise(args.images)
    print(f"{training.device_name(device)}, {str(dtype or torch.float32)[6:]}")
    speeds = input_speeds(images, repeats=args.repeats)
    speeds |= loop_speeds(
        images, device=device, dtype=dtype, batch_size=args.batch_size, repeats=args.repeats
    )
    rows = [
        {"what": name, "median": statistics.median(v), "lowest": min(v), "highest": max(v)}
        for name, v in speeds.items()
    ]
    print(f"{'images/s':44}{'median':>9}{'lowest':>9}{'highest':>9}")
    for row in rows:
        numbers = "".join(f"{row[name]:9,.0f}" for name in ("median", "lowest", "highest"))
        print(f"{row['what']:44}{numbers}")
    print(f"batches are {rows[1]['median'] / rows[0]['median']:.1f} times as fast as single images")
    print(f"Lightning runs at {rows[3]['median'] / rows[2]['median']:.3f} of the plain loop")
    if args.csv:
        with training.whole_file(args.csv) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
