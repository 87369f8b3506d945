"""Train a recipe from the command line: `python -m utils.train s10 --data sample`."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torchvision

from utils import InputError, data, plotting, training
from utils.models import dirac_init, make_model, whiten_init
from utils.recipes import RECIPES, recipe
from utils.schedule import one_cycle, one_cycle_rates
from utils.transforms import channel_statistics


def main(arguments=None):
    args = parse(arguments)
    plt.switch_backend("Agg")  # figures go to files; no window, no display needed
    # Where torchrun, SLURM or Lightning start several processes, only the first one speaks.
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    first = next((os.environ[name] for name in names if name in os.environ), "0") == "0"
    try:
        with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
            run(args)
    except InputError as error:
        sys.exit(f"error: {error}" if first else 1)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command with --resume goes on from the last whole epoch")


def parse(arguments=None):
    """The command line's arguments, `sys.argv` unless a list of strings is given."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.train",
        description="Trains a recipe and writes weights, history, metrics and figures to a folder.",
    )
    parser.add_argument("recipe", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument(
        "--data", default="cifar10", metavar="cifar10|sample|DIR",
        help="CIFAR-10 (downloaded to data/ at first), the built-in sample, or a folder with "
        "train/<class>/* and test/<class>/* (default: cifar10)",
    )
    parser.add_argument("--epochs", type=int, help="another length; the peak moves along with it")
    parser.add_argument(
        "--batch-size", type=int, help="of all processes together (default: the recipe's)"
    )
    parser.add_argument("--max-lr", type=float, help="the rate at the peak; min_lr keeps its share")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="another value for a setting of the recipe, such as cutout=0; may be repeated",
    )
    parser.add_argument(
        "--as-published", action="store_true",
        help="the source's settings also where the recipe departs from them",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="default: 0")
    parser.add_argument("--device", help="cuda, mps, cpu, … (default: the best there is)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="auto: bf16 or fp16 on GPUs and CPUs where it pays (default)",
    )
    parser.add_argument("--out", type=Path, help="default: runs/<recipe>-<data>-seed<seed>")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument(
        "--validate", action="store_true",
        help="hold out a tenth of the training images and report on it, not on the test images; "
        "for choosing settings",
    )
    parser.add_argument(
        "--loop", choices=CHECKPOINTS,
        help="our own loop, or PyTorch Lightning's (default: the recipe's)",
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="torch.compile the network first; its time is reported apart (plain loop only)",
    )
    scale = parser.add_argument_group("with --loop lightning")
    scale.add_argument(
        "--devices", type=_count, default=1, metavar="N", help="processes a machine (default: 1)"
    )
    scale.add_argument(
        "--num-nodes", type=_count, default=1, metavar="N", help="machines (default: 1)"
    )
    scale.add_argument("--strategy", default="auto", help="ddp, … (default: Lightning's choice)")
    args = parser.parse_args(arguments)
    args.out = args.out or Path("runs") / f"{args.recipe}-{Path(args.data).name}-seed{args.seed}"
    return args


CHECKPOINTS = {"plain": "checkpoint.pt", "lightning": "last.ckpt"}


PRECISIONS = {
    "auto": training.amp_dtype,
    "fp32": lambda device: None,
    "bf16": lambda device: torch.bfloat16,
    "fp16": lambda device: torch.float16,
}


def _seed(text):
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError("must be from 0 to 4294967295")
    return seed


def _count(text):
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def settings_of(args):
    """The recipe as the command line has it, before the data is known.

    Raises InputError where it asks for what can't be, or its folder holds another run.
    """
    settings = recipe(args.recipe)
    settings = settings.as_published() if args.as_published else settings
    settings = settings.changed(args.set).scaled(
        epochs=args.epochs, batch_size=args.batch_size, max_lr=args.max_lr
    )
    settings = dataclasses.replace(settings, loop=args.loop or settings.loop)
    scale = (args.devices, args.num_nodes, args.strategy)
    if settings.loop == "plain" and scale != (1, 1, "auto"):
        raise InputError("--devices, --num-nodes and --strategy need --loop lightning")
    if settings.loop == "lightning" and args.compile:
        raise InputError("--compile needs --loop plain")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"{args.out} is a file; name another --out")
    there = [loop for loop, name in CHECKPOINTS.items() if (args.out / name).exists()]
    if there and not args.resume:
        raise InputError(
            f"{args.out} holds a run already; add --resume to go on with it, or name another --out"
        )
    if there and settings.loop not in there:
        raise InputError(f"{args.out} holds a run of the other loop; add --loop {there[0]}")
    return settings


def fitted(settings, args, images):
    """The settings for an `ImageData`: the sample has a schedule of its own, unless named."""
    named = {assignment.partition("=")[0] for assignment in args.set}
    own = {
        name: getattr(images, name) for name in ("epochs", "batch_size")
        if name not in named and getattr(args, name) is None
    }
    return settings.scaled(**own)


def run(args, images=None):
    """Trains what `parse` gave and writes everything to its folder.

    `images`: an `ImageData` in the place of the one that the arguments name.
    """
    start, commit = time.perf_counter(), current_commit()
    settings, out = settings_of(args), args.out
    device = training.pick_device(args.device)
    dtype = PRECISIONS[args.precision](device)
    images = images or data.load(args.data)
    if args.validate:
        images = data.hold_out(images)
    images = data.with_validation(images, fraction=settings.held_out)
    settings = fitted(settings, args, images)
    print(f"data     {images}")
    print(textwrap.fill(f"recipe   {settings}", 92, subsequent_indent=" " * 9))
    print(f"device   {training.device_name(device)}, {str(dtype or torch.float32)[6:]}")
    print(f"output   {out}\n", flush=True)

    how = {"seed": args.seed, "device": device, "dtype": dtype, "resume": args.resume}
    if settings.loop == "lightning":
        scale = {"devices": args.devices, "num_nodes": args.num_nodes, "strategy": args.strategy}
        trained = train_lightning(settings, images, out=out, **how, **scale)
    else:
        checkpoint = out / CHECKPOINTS["plain"]
        trained = train(settings, images, checkpoint=checkpoint, compiled=args.compile, **how)
    if trained is None:  # not the first process
        return
    model, test_loader, history = trained
    about = weights_metadata(settings, images, seed=args.seed)
    training.save_weights(model, out / "weights.safetensors", metadata=about)
    history.save(out / "history.csv")
    figures = save_figures(out, settings, images, model, test_loader, history, dtype)
    if settings.loop == "lightning":
        from utils import lightning_loop

        lightning_loop.log_pictures(out, figures, step=settings.epochs)
    metrics = {
        "recipe": dataclasses.asdict(settings),
        "seed": args.seed,
        "data": {
            "name": images.name,
            "fingerprint": images.fingerprint,
            "mean": about["mean"],
            "std": about["std"],
        },
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": training.device_name(device),
        "precision": str(dtype or torch.float32)[6:],
        "training_seconds": sum(history.column("seconds")),
        "warm_up_seconds": history.warm_up_seconds,
        "last_epoch": history[-1],
    }
    with training.whole_file(out / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    last = history[-1]
    if args.compile:
        print(f"\ncompiled in {history.warm_up_seconds:.1f} s, which no epoch's time contains")
    elapsed = timedelta(seconds=round(time.perf_counter() - start))
    print(
        f"\ntest accuracy {last['test_acc']:.2f} %, train accuracy {last['train_acc']:.2f} % at "
        f"epoch {last['epoch']} on {images.name}, in {elapsed}"
    )
    print("figures  " + " ".join(str(path) for path in figures))


def weights_metadata(settings, images, *, seed=0):
    """What a weights file says of its run, for `training.save_weights`: a dict of plain values.

    Enough to build the network again and to use it: its name, its classes, and the mean and the
    deviation of its training images.
    """
    mean, std = channel_statistics(images.train_images)
    return {
        "recipe": settings.name,
        "seed": seed,
        "model": settings.model,
        "fc_bias": settings.fc_bias,
        "classes": list(images.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "data": images.fingerprint,
    }


@functools.cache  # what is committed later is not what runs here
def current_commit():
    """The repository's commit, with "+" where its files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def train(
    settings, images, *, seed=0, device, dtype=None, checkpoint=None, resume=False, compiled=False
):
    """Builds everything that the recipe `settings` names and trains it on an `ImageData`.

    Returns the model, the loader of the test images, and the `History`.
    """
    train_loader, test_loader = training.make_loaders(settings, images, seed=seed, device=device)
    model = new_model(settings, images, seed=seed).to(device)
    optimizer = training.make_optimizer(model, settings)
    scheduler = one_cycle(
        optimizer, total_steps=settings.epochs * len(train_loader), **settings.rates()
    )
    history = training.fit(
        model, train_loader, test_loader, optimizer, scheduler, recipe=settings, dtype=dtype,
        checkpoint=checkpoint, resume=resume,
        identity={"seed": seed, "data": images.fingerprint}, compiled=compiled,
    )
    return model, test_loader, history


def train_lightning(settings, images, *, seed=0, device, dtype=None, out, resume=False, **scale):
    """`train` under PyTorch Lightning, which keeps checkpoints and logs in the folder `out`.

    `scale`: `devices`, `num_nodes` and `strategy` of its Trainer. Returns the same, but None in
    all processes except the first.
    """
    from utils import lightning_loop  # here, because it takes seconds

    module = lightning_loop.Classifier(
        new_model(settings, images, seed=seed), settings, len(images.classes),
        identity={"seed": seed, "data": images.fingerprint},
    )
    trainer = lightning_loop.make_trainer(
        settings, out, device=device, dtype=dtype,
        validation=images.validation_images is not None, **scale,
    )
    history = lightning_loop.fit(
        trainer, module, lightning_loop.ImageDataModule(settings, images, seed=seed),
        resume=resume,
    )
    if not trainer.is_global_zero:
        return None
    _, test_loader = training.make_loaders(settings, images, device=device)
    return module.model.to(device), test_loader, history


def new_model(settings, images, *, seed=0):
    """The recipe's network for an `ImageData`, initialised by `seed`, on the CPU."""
    torch.manual_seed(seed)
    model = make_model(settings.model, len(images.classes), fc_bias=settings.fc_bias)
    with torch.no_grad():
        model.fc.weight *= settings.logit_scale
    if settings.dirac:
        dirac_init(model)
    if settings.whiten:
        _, normalize = training.make_transforms(settings, images)
        # from all over them: in a folder they are sorted by class
        some = images.train_images[:: max(1, len(images.train_images) // 1000)][:1000]
        whiten_init(model, normalize(some))
    return model.to(memory_format=torch.channels_last)


def save_figures(out, settings, images, model, test_loader, history, dtype):
    """Draws the run's pictures into the folder `out` and returns their paths."""
    plotting.use_style()
    logits, labels = training.predict(model, test_loader, dtype=dtype)
    confidences, predictions = logits.softmax(1).max(1)
    matrix = training.confusion_matrix(predictions, labels, len(images.classes))
    wrong = training.misclassified(predictions, labels)
    steps_per_epoch = -(-len(images.train_images) // settings.batch_size)
    rates = one_cycle_rates(
        total_steps=settings.epochs * steps_per_epoch, **settings.rates()
    )
    drawn = {
        "schedule": lambda: plotting.lr_schedule(rates, steps_per_epoch=steps_per_epoch),
        "loss": lambda: plotting.loss_curves(history),
        "accuracy": lambda: plotting.accuracy_curves(history),
        "per_class": lambda: plotting.per_class_accuracy(matrix, images.classes),
        "confusion": lambda: plotting.confusion_matrix(matrix, images.classes),
    }
    if len(wrong):
        drawn["misclassified"] = lambda: plotting.misclassified_grid(
            images.test_images[wrong], labels[wrong], predictions[wrong], confidences[wrong],
            images.classes,
        )
    paths = []
    for name, draw in drawn.items():
        draw()
        figure = plt.gcf()
        figure.suptitle(f"{settings.name} on {images.name}")
        paths.append(out / f"{name}.png")
        with training.whole_file(paths[-1]) as part:
            figure.savefig(part, format="png", bbox_inches="tight")
        plt.close(figure)
    return paths


if __name__ == "__main__":
    main()
