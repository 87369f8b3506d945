"""A training run: a recipe on an `ImageData`, into a folder."""

import functools
import json
import os
import platform
import subprocess
import tempfile
import textwrap
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

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
    resize: int | None = None
    """side in pixels to which the middle square of each picture of a folder is brought, for
    photographs of any sizes; None: all have one size already"""
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
    """processes per machine, under Lightning"""
    num_nodes: int = 1
    """machines, under Lightning"""
    strategy: str = "auto"
    """ddp, …, under Lightning"""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be from 0 to 4294967295, not {self.seed}")
        if min(self.devices, self.num_nodes) < 1:
            raise InputError("--devices and --num-nodes must be at least 1")

    @property
    def processes(self):
        """How many there are on all machines."""
        return self.devices * self.num_nodes


FILES = ("weights.safetensors", "metrics.json", *files.CHECKPOINTS.values())  # make a run


def folder_name(recipe, options):
    """What the folder of a run is called where nothing else is said."""
    return f"{recipe.name}-{Path(options.data).resolve().name}-seed{options.seed}"


def is_first_process(options):
    """Whether this is the first of the processes that `options` ask for: it speaks and writes.

    Where they ask for one it is that, whatever the environment says of others.
    """
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return options.processes == 1 or {os.environ.get(name, "0") for name in names} == {"0"}


def check_processes(recipe, options):
    """Raises InputError where the recipe can't be run by as many processes as there are."""
    asked = str(options.processes)
    started = os.environ.get("WORLD_SIZE", asked)
    if started != asked:
        raise InputError(
            f"--devices and --num-nodes ask for {asked} process(es), but WORLD_SIZE, which "
            f"torchrun sets, is {started}; make them agree"
        )
    if recipe.loop == "plain" and (options.processes > 1 or options.strategy != "auto"):
        raise InputError("several processes (--devices, --num-nodes) need --loop lightning")
    if options.out is None and options.processes > 1:
        raise InputError("several processes need one folder for all of them; name it by --out")


@contextmanager
def output_folder(recipe, options):
    """The folder of the run that `options` ask for, which no new run can take any more.

    Where nothing comes about it is given back at the end. Raises InputError where it can't be
    one, can't be written to, or holds another run.
    """
    check_processes(recipe, options)
    named = Path(os.path.expanduser(options.out or Path("runs", folder_name(recipe, options))))
    if not is_first_process(options):
        yield named
        return
    folders = [named]
    if options.out is None:
        folders += [named.with_name(f"{named.name}-{number}") for number in range(2, 1000)]
    if options.resume:
        there = filter(os.path.exists, folders)
        folders = [max(there, key=os.path.getmtime, default=named)]
    for out in folders:
        reserved = _reserve(out)
        if reserved or options.resume:
            break
    else:
        raise InputError(
            f"{out} holds a run already; add --resume to go on with it, or name another --out"
        )
    there = [loop for loop, name in files.CHECKPOINTS.items() if (out / name).exists()]
    if recipe.loop not in there and _holds_run(out):
        mend = f"add --loop {there[0]}" if there else "name another --out"
        raise InputError(f"{out} holds a run without a checkpoint of this loop; {mend}")
    try:
        yield out
    finally:
        if reserved and not _holds_run(out):
            (out / "history.csv").unlink(missing_ok=True)
            with suppress(OSError):  # where it holds something else
                os.removedirs(out)


def _holds_run(out):
    return any((out / name).exists() for name in FILES)


def _reserve(out):
    """Whether a folder was free for a run. It is no more: an empty history stands for the run.

    Raises InputError where it can't be one, or can't be written to.
    """
    with files.writing(out):
        for path in (out, *out.parents):
            if path.is_file():
                raise InputError(f"{path} is a file; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as trial:
            trial.write(bytes(2**20))
        if not _holds_run(out):
            with suppress(FileExistsError):
                (out / "history.csv").touch(exist_ok=False)
                return True
    return False


def run(recipe, images, options, out):
    """Trains the recipe on an `ImageData` and writes everything to the folder `out`."""
    import torchvision  # here, because it takes seconds

    start = time.perf_counter()
    commit = current_commit()
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
    print(f"output   {out}\n")

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
    files.save_tensors(model.state_dict(), out / "weights.safetensors", about)
    files.save_table(history, out / "history.csv")
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
    if not (out / "metrics.json").exists():  # else nothing was trained just now
        files.save_text(json.dumps(metrics, indent=2) + "\n", out / "metrics.json")
    figures = save_figures(out, recipe, images, results, history)
    elapsed = timedelta(seconds=round(time.perf_counter() - start))
    print(
        f"\ntest accuracy {last['test_acc']:.2f} %, train accuracy {last['train_acc']:.2f} % at "
        f"epoch {last['epoch']} on {images.name}, in {elapsed}"
    )
    print("figures ", *figures)
    for line in plotting.numbered(images.classes):
        print(f"         {line}")


def weights_metadata(recipe, images, *, seed=0):
    """What a weights file says of its run, for `files.save_tensors`: a dict of plain values.

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
    """The repository's commit, with "+" where its files differ from it; "" without git.

    A copy without .git has none, also where it lies in another repository.
    """
    root = Path(__file__).parents[1]
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    command += ["describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        git = subprocess.run(command, cwd=root, capture_output=True, text=True)
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
    optimizer = make_optimizer(model, recipe)
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
        "schedule": plotting.lr_schedule(rates, steps_per_epoch=steps_per_epoch),
        "loss": plotting.loss_curves(history, smoothed=recipe.label_smoothing > 0),
        "accuracy": plotting.accuracy_curves(history),
        "per_class": plotting.per_class_accuracy(results),
        "confusion": plotting.confusion_matrix(results),
    }
    if results.accuracy < 100:
        drawn["misclassified"] = plotting.misclassified_grid(results, images.test_images)[0, 0]
    paths = []
    for name, ax in drawn.items():
        ax.figure.suptitle(plotting.as_text(figure_title(recipe, images)), wrap=True)
        paths.append(out / f"{name}.png")
        files.save_figure(ax.figure, paths[-1])
    return paths


def figure_title(recipe, images, *, runs="one run"):
    """What stands above pictures of one run, or of several: "s10 · 3 runs of 24 epochs on …"."""
    epochs = "one epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return f"{recipe.name} · {runs} of {epochs} on {images.name}"
