"""Results to keep in images/: `python -m utils.maintenance.record s10 --from runs/s10-*`."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro

from utils import InputError, data, devices, explain, files, plotting, run
from utils.maintenance import tables
from utils.models import load_weights
from utils.recipes import ABOUT_THE_SOURCE, RECIPES, Recipe, recipe
from utils.results import save_predictions
from utils.train import as_command


@dataclass(frozen=True)
class Arguments:
    """Keeps the results of a recipe's finished runs in images/<recipe>/ and the README's tables."""

    recipe: tyro.conf.Positional[Literal[tuple(RECIPES)]]
    """what was trained"""
    runs: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """the folders of the runs"""
    tuning: tuple[Path, ...] = ()
    """runs made with --validate, to be kept as what was tried to choose the settings"""
    data: str = "cifar10"
    """what the runs were trained on, as for utils.train"""
    resize: int | None = None
    """as for utils.train"""
    device: str | None = None
    """cuda, mps, cpu, …; None: the best there is"""
    weights: bool = False
    """keep the median run's weights too, in float16, and their predictions"""
    to: Path | None = None
    """another folder than images/<recipe>; the README stays as it is"""


def main(arguments=None):
    with as_command():
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.maintenance.record")
        if bool(args.runs) == bool(args.tuning):
            raise InputError("give either --from DIR … or --tuning DIR …")
        folder = args.to or tables.IMAGES / args.recipe
        device = devices.pick_device(args.device)
        images = data.load(args.data, resize=args.resize)
        if args.tuning:
            images = data.hold_out(images)
            trials = [trial(args.recipe, Path(out), images, device) for out in args.tuning]
            files.save_table(trials, folder / "tuning.csv")
        else:
            keep(args.recipe, args.runs, images, folder, weights=args.weights, device=device)
        print(f"recorded in {folder}")
        if not args.to:
            tables.write()


def recipe_of(out):
    """(recipe, metrics) of the finished run in the folder `out`.

    What an older version did not know has its default.
    """
    metrics = files.read_metrics(out)
    settings = {k: v for k, v in metrics["recipe"].items() if k not in ABOUT_THE_SOURCE}
    return Recipe(**settings), metrics


def keep(name, outs, images, folder, *, weights=False, device):
    """Keeps the results of the finished runs `outs` of the recipe `name` in `folder`.

    That is runs.csv, a history_seed<k>.csv of each, the figures and logs of the median run by
    test accuracy (the lower one of two), of several runs accuracy.png with all of them, and with
    `weights` the median run's in float16, with what they make of the test images. `images`: the
    `ImageData` of the runs, on which they are evaluated again. Raises InputError where the runs
    are not all finished, of this recipe with the same settings and precision, of this data, and
    of different seeds, or where the weights do not give the accuracy that was noted.
    """
    runs = [(*recipe_of(out), Path(out)) for out in outs]
    runs = sorted(runs, key=lambda entry: entry[1]["seed"])
    check(name, runs, images)
    table = pd.DataFrame([row(*entry, images, device) for entry in runs])
    median = runs[table["test_acc"].argsort().iloc[(len(runs) - 1) // 2]][2]

    for old in (*folder.glob("history_seed*.csv"), *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    files.save_table(table, folder / "runs.csv")
    for _, metrics, out in runs:
        shutil.copyfile(out / "history.csv", folder / f"history_seed{metrics['seed']}.csv")
    for figure in median.glob("*.png"):
        shutil.copyfile(figure, folder / figure.name)
    for logs in ("csv", "tensorboard"):  # of Lightning
        shutil.rmtree(folder / logs, ignore_errors=True)
        if (median / logs).exists():
            shutil.copytree(median / logs, folder / logs)
    if len(runs) > 1:
        plotting.use_style()
        histories = [files.read_table(out / "history.csv") for *_, out in runs]
        ax = plotting.accuracy_band([history.to_dict("records") for history in histories])
        title = run.figure_title(runs[0][0], images, runs=f"{len(runs)} runs")
        ax.figure.suptitle(title, wrap=True)
        files.save_figure(ax.figure, folder / "accuracy.png")
    if weights:
        model, path = load_weights(median / "weights.safetensors"), folder / "weights.safetensors"
        files.save_tensors(half(model).state_dict(), path, model.metadata)
        results = explain.predictions(load_weights(path).to(device), images)
        save_predictions(results, folder / "predictions.safetensors")


def half(model):
    """The model in float16. Raises InputError where a number is too large for it."""
    for name, tensor in model.half().state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} is too large for float16; record without --weights")
    return model


def check(name, runs, images):
    """Raises InputError where the runs do not belong together, to `name` or to the images."""
    seeds = [metrics["seed"] for _, metrics, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the seeds of the runs are {seeds}; give each of them once")
    first, first_metrics, first_out = runs[0]
    fingerprint = data.with_validation(images, fraction=first.held_out).fingerprint
    for settings, metrics, out in runs:
        if settings.name != name:
            raise InputError(f"{out} holds a run of {settings.name}, not of {name}")
        if settings.differences(first) or metrics["precision"] != first_metrics["precision"]:
            raise InputError(
                f"{out} differs from {first_out} in settings or precision; leave one out"
            )
        if metrics["data"]["fingerprint"] != fingerprint:
            raise InputError(f"{out} holds a run on other data than {images.name}; name its --data")


def evaluated(metrics, out, images, device):
    """A run's weights on the test images, plainly and with test-time flip: two `Results`.

    Raises InputError where they do not have the accuracy that was noted.
    """
    model = load_weights(out / "weights.safetensors").to(device)
    dtypes = {devices.dtype_name(dtype): dtype for dtype in (None, devices.amp_dtype(device))}
    dtype = dtypes.get(metrics["precision"])  # float32 where the device would have to emulate it
    plain, flipped = explain.plain_and_flipped(model, images, dtype=dtype)
    last = metrics["last_epoch"]
    if abs(plain.accuracy - last["test_acc"]) > 0.1:  # another device rounds otherwise
        raise InputError(
            f"{out} notes a test accuracy of {last['test_acc']:.2f}, its weights have "
            f"{plain.accuracy:.2f}; train it again"
        )
    return plain, flipped


def row(settings, metrics, out, images, device):
    """A run's line of runs.csv, a dict."""
    plain, flipped = evaluated(metrics, out, images, device)
    last = metrics["last_epoch"]
    return {"recipe": settings.name} | common(settings, metrics) | {
        "train_loss": last["train_loss"], "test_acc": last["test_acc"],
        "test_loss": last["test_loss"], "test_acc_flip": flipped.accuracy, **metrics["versions"],
        "commit": metrics.get("commit", ""),  # older runs don't tell
        "data": metrics["data"]["fingerprint"],
    }


def common(settings, metrics):
    """What runs.csv and tuning.csv tell alike of a run, a dict.

    `changed`: what its recipe has otherwise than the one of its name: "cutout=0; dirac=True".
    """
    plain = recipe(settings.name).scaled(epochs=settings.epochs)
    changes = settings.differences(plain).items()
    return {
        "changed": "; ".join(f"{name}={value}" for name, value in changes),
        "seed": metrics["seed"], "epochs": settings.epochs,
        "train_acc": metrics["last_epoch"]["train_acc"], "seconds": metrics["training_seconds"],
        "device": metrics["device"], "precision": metrics["precision"],
    }


def trial(name, out, images, device):
    """A line of tuning.csv, a dict, for a run by `utils.train --validate`.

    `images`: the `ImageData` with the images that judge it as test images. Raises InputError for a
    run that was tested on the test images themselves: they choose nothing.
    """
    settings, metrics = recipe_of(out)
    if not metrics["data"]["name"].endswith(data.HELD_OUT):
        raise InputError(f"{out} was tested on the test images; train it with --validate")
    _, flipped = evaluated(metrics, out, images, device)
    return common(settings.replace(name=name), metrics) | {
        "data": metrics["data"]["name"].removesuffix(data.HELD_OUT),
        "validation_acc": metrics["last_epoch"]["test_acc"],
        "validation_acc_flip": flipped.accuracy, "commit": metrics.get("commit", ""),
    }


if __name__ == "__main__":
    main()
