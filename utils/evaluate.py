"""How good trained weights are: `python -m utils.evaluate --weights FILE --data cifar10`."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torchmetrics.classification import MulticlassCalibrationError

from utils import InputError, data, training
from utils.models import load_weights
from utils.progress import progress_bar
from utils.train import PRECISIONS
from utils.transforms import BatchTransform

BATCH_SIZE = 1000
BINS = 15  # of confidence, from 0 to 1


def main(arguments=None):
    args = _parse(arguments)
    try:
        device = training.pick_device(args.device)
        dtype = PRECISIONS[args.precision](device)
        model = load_weights(args.weights).to(device)
        left_out = data.read_fingerprints(args.leave_out) if args.leave_out else ()
        images = data.load(args.data, train=False)
        check_classes(model, images)
        print(
            f"weights  {model.metadata.get('recipe')}, seed {model.metadata.get('seed')}\n"
            f"data     {images.name}: {len(images.test_images):,} test images\n"
            f"device   {training.device_name(device)}, {str(dtype or torch.float32)[6:]}\n",
            flush=True,
        )
        result = evaluate(
            model, images.test_images, images.test_labels, dtype=dtype, left_out=left_out
        )
        print(report(result))
        if args.json:
            with training.whole_file(args.json) as part:
                part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except InputError as error:
        sys.exit(f"error: {error}")


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluate",
        description="Accuracy and calibration of trained weights on the test images.",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="weights.safetensors of a run (default: those that come with the repository)",
    )
    parser.add_argument(
        "--data", default="cifar10", metavar="cifar10|sample|DIR",
        help="as for utils.train (default: cifar10)",
    )
    parser.add_argument("--device", help="cuda, mps, cpu, … (default: the best there is)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="auto: bf16 or fp16 on GPUs and CPUs where it pays (default)",
    )
    parser.add_argument(
        "--leave-out", type=Path, metavar="FILE",
        help="also count without these images: a fingerprint a line, as in "
        "images/inexact_test_images.txt",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(arguments)


def check_classes(model, images):
    """Raises InputError where the classes of an `ImageData` are not those of the weights."""
    if model.classes != images.classes:
        raise InputError(
            f"the weights know the classes {', '.join(model.classes)}; {images.name} has "
            f"{', '.join(images.classes)}: choose weights and data that belong together"
        )


def evaluate(model, images, labels, *, dtype=None, left_out=()):
    """What the network `model`, from `load_weights`, makes of images uint8 (N, 3, H, W).

    `labels`: int64 (N,). `left_out`: fingerprints of images, see `data.fingerprints`; the
    entries that end in `exact` do without these. Works on the model's device, in mixed precision
    `dtype`. Returns a dict of plain values, all but the counts in percent; `flip` stands for
    test-time flip, where the logits of an image and of its mirror image are averaged, and
    `calibration_error` for the expected calibration error, of the logits without it, over 15
    equal bins of confidence (Guo et al., "On Calibration of Modern Neural Networks", 2017).
    Raises InputError where all images are left out.
    """
    kept = torch.tensor([name not in left_out for name in data.fingerprints(images)])
    if not kept.any():
        raise InputError("all images are left out; leave some in")
    logits = _logits(model, images, labels, dtype, "images")
    both = (logits + _logits(model, images.flip(3), labels, dtype, "mirror images")) / 2
    right, right_flip = logits.argmax(1) == labels, both.argmax(1) == labels
    error = MulticlassCalibrationError(len(model.classes), n_bins=BINS, norm="l1")
    return {
        "images": len(labels),
        "left_out": len(labels) - int(kept.sum()),
        "accuracy": _share(right),
        "accuracy_exact": _share(right[kept]),
        "accuracy_flip": _share(right_flip),
        "accuracy_flip_exact": _share(right_flip[kept]),
        "calibration_error": 100 * error(logits.softmax(1), labels).item(),
        "per_class": {
            name: _share(right[labels == index])
            for index, name in enumerate(model.classes) if (labels == index).any()
        },
    }


def _logits(model, images, labels, dtype, name):
    """float32 (N, C) on the CPU."""
    device = next(model.parameters()).device
    normalize = BatchTransform(model.mean, model.std, augment=False)
    loader = data.make_loader(
        images.to(device), labels.to(device), normalize, batch_size=BATCH_SIZE
    )
    return training.predict(model, progress_bar(loader, desc=name), dtype=dtype)[0]


def _share(right):
    return 100 * right.sum().item() / len(right)


def report(result):
    """The dict of `evaluate` as lines of text."""
    names = {"accuracy": "test accuracy", "accuracy_flip": "with test-time flip"}
    kept = result["images"] - result["left_out"]
    lines = [f"{'':20}{result['images']:>8,} images"]
    if result["left_out"]:
        lines[0] += f"{kept:>10,} (without {result['left_out']} left out)"
    for key, name in names.items():
        line = f"{name:20}{result[key]:>13.2f} %"
        if result["left_out"]:
            line += f"{result[f'{key}_exact']:>8.2f} %"
        lines.append(line)
    lines.append(
        f"{'calibration error':20}{result['calibration_error']:>13.2f} %  (ECE, {BINS} bins)\n"
    )
    width = max(map(len, result["per_class"]))
    lines += [f"{name:{width}} {share:6.2f} %" for name, share in result["per_class"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
