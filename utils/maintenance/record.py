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
        images = data.load(args.data)
        if args.tuning:
            trials = [trial_row(args.recipe, read_run(out), images, device) for out in args.tuning]
            files.save_table(trials, folder / "tuning.csv")
        else:
            record_runs(args.recipe, args.runs, images, folder, weights=args.weights, device=device)
        print(f"recorded in {folder}")
        if not args.to:
            tables.write()


@dataclass(frozen=True)
class FinishedRun:
    """What metrics.json in the folder `out` says, and the recipe in it."""

    out: Path
    recipe: Recipe
    metrics: dict


def read_run(out):
    """The `FinishedRun` in the folder `out`. What an older version did not know has its default."""
    metrics = {"commit": "", **files.read_metrics(out)}
    settings = {k: v for k, v in metrics["recipe"].items() if k not in ABOUT_THE_SOURCE}
    return FinishedRun(Path(out), Recipe(**settings), metrics)


def record_runs(name, outs, images, folder, *, weights=False, device):
    """Keeps the results of the finished runs `outs` of the recipe `name` in `folder`.

    That is runs.csv, a history_seed<k>.csv of each, the figures and logs of the median run by
    test accuracy (the lower one of two), of several runs accuracy.png with all of them, and with
    `weights` the median run's in float16, with what they make of the test images. `images`: the
    `ImageData` of the runs, on which they are evaluated again. Raises InputError where the runs
    are not all finished, of this recipe with the same settings and precision, of this data, and
    of different seeds, or where the weights do not give the accuracy that was noted.
    """
    runs = sorted(map(read_run, outs), key=lambda each: each.metrics["seed"])
    refuse_mixed_runs(name, runs, images)
    table = pd.DataFrame([run_row(each, images, device) for each in runs])
    median = runs[table["test_acc"].argsort().iloc[(len(runs) - 1) // 2]].out

    for old in (*folder.glob("history_seed*.csv"), *folder.glob("*.safetensors")):
        old.unlink()
    files.save_table(table, folder / "runs.csv")
    for each in runs:
        seed = each.metrics["seed"]
        shutil.copyfile(each.out / "history.csv", folder / f"history_seed{seed}.csv")
    for figure in median.glob("*.png"):
        shutil.copy(figure, folder)
    for logs in ("csv", "tensorboard"):  # of Lightning
        shutil.rmtree(folder / logs, ignore_errors=True)
        if (median / logs).exists():
            shutil.copytree(median / logs, folder / logs)
    if len(runs) > 1:
        plotting.use_style()
        ax = plotting.accuracy_band([files.read_table(each.out / "history.csv") for each in runs])
        title = run.figure_title(runs[0].recipe, images, runs=f"{len(runs)} runs")
        ax.figure.suptitle(title, wrap=True)
        files.save_figure(ax.figure, folder / "accuracy.png")
    if weights:
        model = load_weights(median / "weights.safetensors")
        path = folder / "weights.safetensors"
        files.save_tensors(model.half().state_dict(), path, model.metadata)
        results = explain.predictions(load_weights(path).to(device), images)
        save_predictions(results, folder / "predictions.safetensors")


def refuse_mixed_runs(name, runs, images):
    """Raises InputError where the runs do not belong together, to `name` or to the images."""
    seeds = [each.metrics["seed"] for each in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the seeds of the runs are {seeds}; give each of them once")
    first = runs[0]
    for each in runs:
        if each.recipe.name != name:
            raise InputError(f"{each.out} holds a run of {each.recipe.name}, not of {name}")
        if (
            each.recipe.differences(first.recipe)
            or each.metrics["precision"] != first.metrics["precision"]
        ):
            raise InputError(
                f"{each.out} differs from {first.out} in settings or precision; leave one out"
            )
        if not trained_on(images, each):
            raise InputError(
                f"{each.out} holds a run on other data than {images.name}; name its --data"
            )


def trained_on(images, finished):
    """Whether these are the training and test images of a `FinishedRun`."""
    images = data.with_validation(images, fraction=finished.recipe.held_out)
    return finished.metrics["data"]["fingerprint"] == images.fingerprint


def evaluate_again(finished, images, device):
    """A run's accuracy on the test images with test-time flip.

    In float32, whatever the run's precision, so that all machines record the same. Raises
    InputError where its weights do not have the accuracy that was noted without the flip.
    """
    model = load_weights(finished.out / "weights.safetensors").to(device)
    plain, flipped = explain.plain_and_flipped(model, images)
    noted = finished.metrics["last_epoch"]["test_acc"]
    if abs(plain.accuracy - noted) > 0.5:  # the run may have rounded otherwise
        raise InputError(
            f"{finished.out} notes a test accuracy of {noted:.2f}, its weights have "
            f"{plain.accuracy:.2f}; train it again"
        )
    return flipped.accuracy


def run_row(finished, images, device):
    """A run's line of runs.csv, a dict."""
    metrics = finished.metrics
    last = metrics["last_epoch"]
    return {"recipe": finished.recipe.name} | shared_columns(finished.recipe, metrics) | {
        "train_loss": last["train_loss"], "test_acc": last["test_acc"],
        "test_loss": last["test_loss"], "test_acc_flip": evaluate_again(finished, images, device),
        **metrics["versions"],
        "commit": metrics["commit"], "data": metrics["data"]["fingerprint"],
    }


def trial_row(name, finished, images, device):
    """A line of tuning.csv, a dict, for a run by `utils.train --validate` on an `ImageData`.

    Raises InputError for a run that was tested on the test images themselves: they choose nothing.
    """
    held_out = data.hold_out(images)
    if not trained_on(held_out, finished):
        raise InputError(
            f"{finished.out} holds no run on {images.name} that was made with --validate; train one"
        )
    metrics = finished.metrics
    return shared_columns(finished.recipe.replace(name=name), metrics) | {
        "data": images.name,
        "validation_acc": metrics["last_epoch"]["test_acc"],
        "validation_acc_flip": evaluate_again(finished, held_out, device),
        "commit": metrics["commit"],
    }


def shared_columns(settings, metrics):
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


if __name__ == "__main__":
    main()
