"""How good trained weights are: `python -m utils.evaluate`; what they say: `… picture.jpg`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from utils import data, devices, explain, files
from utils.models import load_weights
from utils.results import BINS
from utils.train import as_command


@dataclass(frozen=True)
class Arguments:
    """Accuracy and calibration of trained weights on the test images, or what they see in pictures.
    """

    pictures: tyro.conf.Positional[tuple[Path, ...]] = ()
    """photographs to classify; none: the test images of --data"""
    weights: Path = files.IMAGES / "s10" / "weights.safetensors"
    """weights.safetensors of a run; those of s10 come with the repository"""
    data: str = "cifar10"
    """as for utils.train"""
    device: str | None = None
    """cuda, mps, cpu, …; None: the best there is"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 or fp16 on GPUs and CPUs where it pays"""


def main(arguments=None):
    with as_command():
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.evaluate")
        device = devices.pick_device(args.device)
        dtype = devices.pick_precision(args.precision, device)
        model = load_weights(args.weights).to(device)
        about = model.metadata
        print(f"weights  {args.weights}: {about.get('recipe')}, seed {about.get('seed')}")
        size = "×".join(map(str, model.size))
        if args.pictures:
            print(f"pictures the middle of each, resized to {size} pixels")
            seen = torch.stack([data.read_picture(path, model.size) for path in args.pictures])
            print(likeliest(args.pictures, explain.probabilities(model, seen), model.classes))
            return
        images = data.load(args.data, train=False, resize=model.size)
        print(
            f"data     {images.name}: {len(images.test_images):,} test images of {size} pixels\n"
            f"device   {devices.device_name(device)}, {devices.dtype_name(dtype)}\n"
        )
        plain, flipped = explain.plain_and_flipped(model, images, dtype=dtype)
        print(report(plain, flipped))


def likeliest(names, probabilities, classes, count=3):
    """The `count` likeliest classes of each picture, with their probabilities (N, C), as text."""
    width = max(map(len, classes))
    lines = []
    for name, shares in zip(names, probabilities, strict=True):
        lines.append(f"\n{name}")
        best, places = shares.topk(min(count, len(classes)))
        for share, place in zip(best, places, strict=True):
            lines.append(f"  {classes[place]:{width}} {share:7.2%}")
    return "\n".join(lines)


def report(plain, flipped):
    """Two `Results`, without and with test-time flip, as lines of text."""
    width = max(map(len, plain.classes))
    return "\n".join([
        f"test accuracy       {plain.accuracy:6.2f} %  of {len(plain.labels):,} images",
        f"with test-time flip {flipped.accuracy:6.2f} %",
        f"calibration error   {plain.calibration_error:6.2f} %  (ECE, {BINS} bins)",
        "",
        *(f"{name:{width}} {share:6.2f} %" for name, share in plain.per_class.items()),
    ])


if __name__ == "__main__":
    main()
