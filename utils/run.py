"""A recipe on an `ImageData` into a folder: what every command calls."""

import functools
import json
import os
import platform
import subprocess
import textwrap
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch

from utils import InputError, data, devices, files, plotting, training
from utils.batches import evaluation_batches, training_batches
from utils.models import ARCHITECTURE, build
from utils.optimization import make_optimizer, one_cycle, one_cycle_rates


@dataclass(frozen=True)
class Options:
    """How and where a recipe is run. Raises InputError for what can't be."""

    data: str = "cifar10"
    """cifar10 (downloaded to data/ at first), sample (built in), or a folder with
    train/<class>/* and test/<class>/*"""
    seed: int = 0
    """of the first weights, the order of the images and their augmentation"""
    device: str | None = None
    """cuda, mps, cpu, …; None: the best there is"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 or fp16 on GPUs and CPUs where it pays"""
    out: Path | None = None
    """folder for the results; None: the next free of runs/<recipe>-<data>-seed<seed>, -2, …"""
    resume: bool = False
    """go on with a run that was cut off; without --out the newest"""
    validate: bool = False
    """hold out a tenth of the training images and report on it, not on the test images; for
    choosing settings"""
    devices: int = 1
    """processes a machine, under Lightning"""
    num_nodes: int = 1
    """machines, under Lightning"""
    strategy: str = "auto"
    """ddp, …, under Lightning"""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be from 0 to 4294967295, not {self.seed}")
        if min(self.devices, self.num_nodes) < 1:
            raise InputError("--devices and --num-nodes must be at least 1")


def folder_name(recipe, options):
    """What the folder of a run is called where nothing else is said."""
    return f"{recipe.name}-{Path(options.data).resolve().name}-seed{options.seed}"


def output_folder(recipe, options):
    """The folder of the run that `options` ask for.

    Raises InputError where it can't be one or holds another run.
    """
    processes = max(options.devices * options.num_nodes, int(os.environ.get("WORLD_SIZE", 1)))
    if recipe.loop == "plain" and (processes > 1 or options.strategy != "auto"):
        raise InputError("several processes (--devices, --num-nodes) need --loop lightning")
    out = options.out
    if out is None:
        if processes > 1:
            raise InputError("several processes need one folder for all of them; name it by --out")
        first = newest = out = Path("runs", folder_name(recipe, options))
        number = 1
        while out.exists():
            newest, number = out, number + 1
            out = first.with_name(f"{first.name}-{number}")
        out = newest if options.resume else out
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; name another --out")
    there = [loop for loop, name in files.CHECKPOINTS.items() if (out / name).exists()]
    if there and not options.resume:
        raise InputError(
            f"{out} holds a run already; add --resume to go on with it, or name another --out"
        )
    if there and recipe.loop not in there:
        raise InputError(f"{out} holds a run of the other loop; add --loop {there[0]}")
    return out


def run(recipe, images, options, out):
    """Trains the recipe on an `ImageData` and writes everything to the folder `out`."""
    import torchvision  # here, because it takes seconds

    start, commit = time.perf_counter(), current_commit()
    devices.prepare()
    device = devices.pick_device(options.device)
    dtype = devices.pick_precision(options.precision, device)
    checkpoint = out / files.CHECKPOINTS[recipe.loop]
    if options.validate:
        images = data.hold_out(images)
    images = data.with_validation(images, fraction=recipe.held_out)
    print(f"data     {images}")
    print(textwrap.fill(f"recipe   {recipe}", 92, subsequent_indent=" " * 9))
    print(f"device   {devices.device_name(device)}, {devices.dtype_name(dtype)}")
    print(f"output   {out}\n", flush=True)

    how = {"seed": options.seed, "device": device, "dtype": dtype, "resume": options.resume}
    if recipe.loop == "lightning":
        scale = {name: getattr(options, name) for name in ("devices", "num_nodes", "strategy")}
        model, history = train_lightning(recipe, images, out=out, **how, **scale)
    else:
        model, history = train_plain(recipe, images, checkpoint=checkpoint, **how)
    if model is None:  # not the first process
        return
    batches = evaluation_batches(images, device=device)
    results = training.predict(model, batches, classes=images.classes, dtype=dtype)
    about = weights_metadata(recipe, images, seed=options.seed)
    files.save_weights(model, out / "weights.safetensors", metadata=about)
    files.save_table(history, out / "history.csv")
    figures = save_figures(out, recipe, images, results, history)
    if recipe.loop == "lightning":
        from utils import lightning_loop

        lightning_loop.log_pictures(out, figures, step=recipe.epochs)
    last = history[-1]
    metrics = {
        "recipe": recipe.model_dump(mode="json"),
        "seed": options.seed,
        "data": {
            "name": images.name, "fingerprint": images.fingerprint,
            "mean": about["mean"], "std": about["std"],
        },
        "commit": commit,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        **{what: ", ".join(dict.fromkeys(row[what] for row in history))
           for what in ("device", "precision")},
        "training_seconds": sum(row["seconds"] for row in history),
        "last_epoch": last,
    }
    files.save_text(json.dumps(metrics, indent=2) + "\n", out / "metrics.json")
    elapsed = timedelta(seconds=round(time.perf_counter() - start))
    print(
        f"\ntest accuracy {last['test_acc']:.2f} %, train accuracy {last['train_acc']:.2f} % at "
        f"epoch {last['epoch']} on {images.name}, in {elapsed}"
    )
    print("figures  " + " ".join(str(path) for path in figures))


def weights_metadata(recipe, images, *, seed=0):
    """What a weights file says of its run, for `files.save_weights`: a dict of plain values.

    Enough to build the network again and to use it: its name, its classes, and the size, mean and
    deviation of its training images.
    """
    mean, std = images.statistics
    return {
        "recipe": recipe.name, "seed": seed,
        "model": recipe.model, **{name: getattr(recipe, name) for name in ARCHITECTURE},
        "classes": list(images.classes), "size": list(images.size),
        "mean": mean.tolist(), "std": std.tolist(), "data": images.fingerprint,
    }


@functools.cache  # what is committed later is not what runs here
def current_commit():
    """The repository's commit, with "+" where its files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


def train_plain(recipe, images, *, seed=0, device, dtype=None, checkpoint=None, resume=False):
    """Builds everything that the recipe names and trains it on an `ImageData` by our own loop.

    Returns the model and the history.
    """
    train_batches = training_batches(recipe, images, seed=seed, device=device)
    test_batches = evaluation_batches(images, device=device)
    model = build(recipe, images, seed=seed).to(device)
    optimizer = make_optimizer(model, recipe, dtype=dtype)
    scheduler = one_cycle(optimizer, recipe, total_steps=recipe.epochs * len(train_batches))
    history = training.fit(
        model, train_batches, test_batches, optimizer, scheduler, recipe, dtype=dtype,
        checkpoint=checkpoint, resume=resume,
        identity={"seed": seed, "data": images.fingerprint},
    )
    return model, history


def train_lightning(
    recipe, images, *, seed=0, device, dtype=None, out, resume=False, **scale
):
    """`train_plain` under PyTorch Lightning, which keeps checkpoints and logs in the folder `out`.

    `scale`: `devices`, `num_nodes` and `strategy` of its Trainer. Returns the same, but (None,
    None) in all processes except the first.
    """
    from utils import lightning_loop  # here, because it takes seconds

    identity = training.run_identity(recipe, seed=seed, data=images.fingerprint)
    module = lightning_loop.Classifier(build(recipe, images, seed=seed), recipe, identity=identity)
    trainer = lightning_loop.make_trainer(
        recipe, out, device=device, dtype=dtype, validation=images.validation_images is not None,
        **scale,
    )
    history = lightning_loop.fit_trainer(
        trainer, module, lightning_loop.ImageDataModule(recipe, images, seed=seed), resume=resume
    )
    return (module.model.to(device), history) if trainer.is_global_zero else (None, None)


def save_figures(out, recipe, images, results, history):
    """Draws the run's pictures into the folder `out` and returns their paths."""
    plotting.use_style()
    steps_per_epoch = -(-len(images.train_images) // recipe.batch_size)
    rates = one_cycle_rates(recipe, total_steps=recipe.epochs * steps_per_epoch)
    drawn = {
        "schedule": lambda: plotting.lr_schedule(rates, steps_per_epoch=steps_per_epoch),
        "loss": lambda: plotting.loss_curves(history, smoothed=recipe.label_smoothing > 0),
        "accuracy": lambda: plotting.accuracy_curves(history),
        "per_class": lambda: plotting.per_class_accuracy(results),
        "confusion": lambda: plotting.confusion_matrix(results),
    }
    if results.accuracy < 100:
        drawn["misclassified"] = lambda: plotting.misclassified_grid(results, images.test_images)
    paths = []
    for name, draw in drawn.items():
        draw()
        plt.gcf().suptitle(figure_title(recipe, images), wrap=True)
        paths.append(out / f"{name}.png")
        files.save_figure(plt.gcf(), paths[-1])
    return paths


def figure_title(recipe, images, *, runs="one run"):
    """What stands above pictures of one run, or of several: "s10 · 3 runs of 24 epochs on …"."""
    epochs = "one epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return f"{recipe.name} · {runs} of {epochs} on {images.name}"


def test_results(model, images, *, dtype=None):
    """What a network of `models.load_weights` makes of the test images of an `ImageData`.

    Two `Results`: plainly, and with test-time flip, where the logits of an image and of its
    mirror image are averaged. Raises InputError where the classes are not those of the weights.
    """
    images.check_classes(model.classes)
    how = {"device": next(model.parameters()).device, "statistics": (model.mean, model.std)}
    mirror_images = replace(images, test_images=images.test_images.flip(3))
    plain, mirrored = (
        training.predict(model, evaluation_batches(seen, **how), classes=model.classes, dtype=dtype)
        for seen in (images, mirror_images)
    )
    both = (plain.logits + mirrored.logits) / 2
    return plain, training.Results(both, plain.labels, plain.classes)
