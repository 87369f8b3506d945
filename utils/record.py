"""Results to keep: `python -m utils.record s10 --seeds 5` trains, and fills `images/s10/`."""

import argparse
import csv
import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from utils import InputError, data, plotting, train, training
from utils.evaluate import check_classes, evaluate
from utils.models import load_weights
from utils.recipes import ABOUT_THE_SOURCE, RECIPES, Recipe, recipe

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "images"
INEXACT = IMAGES / "inexact_test_images.txt"
README = ROOT / "README.md"
SPEEDS = IMAGES / "benchmark" / "speeds.csv"


def main(arguments=None):
    args, others = _parse(arguments)
    plt.switch_backend("Agg")
    try:
        if args.recipe and args.tuning:
            folder = args.to or IMAGES / args.recipe
            write_tuning(args.recipe, args.tuning, folder / "tuning.csv")
            print(f"recorded {len(args.tuning)} trial(s) in {folder / 'tuning.csv'}")
        elif args.recipe:
            recipe(args.recipe)
            if args.seeds:
                _settings(args, others, seed=0)  # refused before anything is read
            images = data.load(args.data)
            outs = args.runs or train_seeds(args, others, images)
            folder = args.to or IMAGES / args.recipe
            record(
                args.recipe, outs, images, folder, weights=args.weights,
                device=training.pick_device(args.device),
            )
            print(f"recorded {len(outs)} run(s) in {folder}")
        if args.table:
            write_tables()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last whole epoch")


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m utils.record", allow_abbrev=False,
        description="Trains a recipe with several seeds and keeps its results in images/<recipe>/, "
        "or rewrites the README's tables. Runs that were cut off are resumed, finished "
        "ones left as they are. Other arguments, such as --epochs, go to utils.train.",
    )
    parser.add_argument("recipe", nargs="?", help=f"one of {', '.join(RECIPES)}")
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--seeds", type=int, metavar="N", help="train the seeds 0 to N - 1")
    runs.add_argument(
        "--from", dest="runs", nargs="+", type=Path, metavar="DIR",
        help="train nothing, keep the finished runs in these folders",
    )
    runs.add_argument(
        "--tuning", nargs="+", type=Path, metavar="DIR",
        help="keep these runs, made with --validate, as what was tried to choose the settings",
    )
    parser.add_argument("--data", default="cifar10", metavar="cifar10|sample|DIR")
    parser.add_argument("--device", help="cuda, mps, cpu, … (default: the best there is)")
    parser.add_argument(
        "--weights", action="store_true", help="keep the median run's weights too, in float16"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="default: images/<recipe>")
    parser.add_argument("--table", action="store_true", help="rewrite the README's tables")
    args, others = parser.parse_known_args(arguments)
    if args.recipe and not (args.runs or args.tuning or (args.seeds or 0) > 0):
        parser.error("a recipe needs --seeds N, at least 1, --from DIR or --tuning DIR")
    if not args.recipe and not args.table:
        parser.error("name a recipe, or --table")
    if others and not args.seeds:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args, others


def _settings(args, others, *, seed):
    """The arguments and the recipe of one run, as `utils.train` understands them."""
    ours = [args.recipe, "--data", args.data, *(["--device", args.device] if args.device else [])]
    plain, run = train.parse(ours), train.parse([*ours, *others])
    for name in ("seed", "out", "resume", "validate", "devices", "num_nodes"):
        if getattr(run, name) != getattr(plain, name):
            raise InputError(
                f"--{name.replace('_', '-')} is not for utils.record; use utils.train, then --from"
            )
    run = train.parse([*ours, *others, "--seed", str(seed), "--resume"])
    return run, train.settings_of(run)


def train_seeds(args, others, images):
    """Trains what is not trained yet. Returns the folders of all runs, by seed."""
    outs = []
    for seed in range(args.seeds):
        run, settings = _settings(args, others, seed=seed)
        if (run.out / "metrics.json").exists():
            settings = train.fitted(settings, run, images)
            odd = _differences(read_metrics(run.out)["recipe"], settings)
            if odd:
                raise InputError(
                    f"{run.out} holds another run ({', '.join(odd)}); delete or rename it"
                )
        else:
            train.run(run, images)
        outs.append(run.out)
    return outs


def read_metrics(out):
    """What the finished run in the folder `out` says of itself. Raises InputError if it can't."""
    try:
        return json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no finished run in {out}; train it with utils.train first") from error


def _differences(settings, expected):
    """Where a run's settings, a dict from JSON, are not those of a recipe: ["cutout=0", …].

    How a run is trained (`loop`) and what its source claims do not count. What an older version
    did not know has its default.
    """
    known = {**_plain(Recipe(settings["name"])), **settings}
    return [
        f"{name}={_rounded(known[name])}" for name, value in _plain(expected).items()
        if name not in ("loop", *ABOUT_THE_SOURCE) and _rounded(known[name]) != _rounded(value)
    ]


def _plain(settings):
    """A recipe as JSON has it: a dict, with lists in the place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _rounded(value):
    return float(f"{value:.9g}") if isinstance(value, float) else value


def record(name, outs, images, folder, *, weights=False, device):
    """Keeps the results of the finished runs `outs` of the recipe `name` in `folder`.

    That is runs.csv, a history_seed<k>.csv of each, the figures of the median run by test
    accuracy (the lower one of two), of several runs accuracy.png with all of them, and with
    `weights` the median run's in float16. `images`: the `ImageData` of the runs, on which they
    are evaluated again for what they do not tell. Raises InputError where the runs are not all
    finished, of this recipe with the same settings, of this data, and of different seeds.
    """
    runs = sorted(((read_metrics(out), Path(out)) for out in outs), key=lambda run: run[0]["seed"])
    _check(name, runs, images)
    rows = [_row(metrics, out, images, device) for metrics, out in runs]
    median = statistics.median_low(row["test_acc"] for row in rows)
    median = runs[[row["test_acc"] for row in rows].index(median)][1]

    for old in folder.glob("history_seed*.csv"):
        old.unlink()
    training.write_csv(rows, folder / "runs.csv")
    for metrics, out in runs:
        shutil.copyfile(out / "history.csv", folder / f"history_seed{metrics['seed']}.csv")
    for figure in median.glob("*.png"):
        shutil.copyfile(figure, folder / figure.name)
    if len(runs) > 1:
        _draw_band(name, [out for _, out in runs], images, folder / "accuracy.png")
    (folder / "weights.safetensors").unlink(missing_ok=True)  # of other runs
    if weights:
        model = load_weights(median / "weights.safetensors")
        training.save_weights(
            model, folder / "weights.safetensors", metadata=model.metadata, dtype=torch.float16
        )


def _check(name, runs, images):
    first, _ = runs[0]
    seeds = [metrics["seed"] for metrics, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the seeds of the runs are {seeds}; give each of them once")
    for metrics, out in runs:
        settings = metrics["recipe"]
        if settings["name"] != name:
            raise InputError(f"{out} holds a run of {settings['name']}, not of {name}")
        if settings != first["recipe"]:
            raise InputError(f"{out} differs from {runs[0][1]} in settings; leave one out")
    fingerprint = data.with_validation(images, fraction=first["recipe"]["held_out"]).fingerprint
    for metrics, out in runs:
        if metrics["data"]["fingerprint"] != fingerprint:
            raise InputError(f"{out} holds a run on other data than {images.name}; name its --data")


def _row(metrics, out, images, device):
    """A run's line of runs.csv."""
    model = load_weights(out / "weights.safetensors").to(device)
    check_classes(model, images)
    dtype = getattr(torch, metrics["precision"])
    result = evaluate(
        model, images.test_images, images.test_labels,
        dtype=None if dtype == torch.float32 else dtype, left_out=data.read_fingerprints(INEXACT),
    )
    settings, last = metrics["recipe"], metrics["last_epoch"]
    plain = recipe(settings["name"]).scaled(epochs=settings["epochs"])
    return {
        "recipe": settings["name"],
        "changed": " ".join(_differences(settings, plain)),
        "seed": metrics["seed"],
        "epochs": settings["epochs"],
        "train_acc": last["train_acc"],
        "train_loss": last["train_loss"],
        "test_acc": last["test_acc"],
        "test_loss": last["test_loss"],
        "test_acc_flip": result["accuracy_flip"],
        "test_acc_exact": result["accuracy_exact"],
        "seconds": metrics["training_seconds"],
        "device": metrics["device"],
        "precision": metrics["precision"],
        **metrics["versions"],
        "commit": metrics.get("commit", ""),  # older runs don't tell
        "data": metrics["data"]["fingerprint"],
    }


def _draw_band(name, outs, images, path):
    plotting.use_style()
    histories = [
        [{key: float(row[key]) for key in row} for row in read_csv(out / "history.csv")]
        for out in outs
    ]
    figure = plotting.accuracy_band(histories).figure
    figure.suptitle(f"{name} on {images.name}")
    with training.whole_file(path) as part:
        figure.savefig(part, format="png", bbox_inches="tight")
    plt.close(figure)


def read_csv(path):
    """The rows of a CSV file, dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


HEADER = """\
| recipe | source's claim: train, test | test | without inexact images | with test-time flip \
| train | epochs | training time | on |
|---|---|---|---|---|---|---|---|---|
"""


def results_table(folder=IMAGES):
    """The Markdown table of all recipes with a runs.csv in `folder`, in the order of RECIPES."""
    paths = {name: Path(folder, name, "runs.csv") for name in RECIPES}
    rows = [_table_row(recipe(name), read_csv(p)) for name, p in paths.items() if p.exists()]
    return HEADER + "".join(rows)


def _table_row(settings, runs):
    claimed = dict(settings.claimed)
    claims = [f"{claimed[name]:.2f}" if name in claimed else "–" for name in ("train", "test")]
    epochs = runs[0]["epochs"]
    seconds = statistics.fmean(float(run["seconds"]) for run in runs)
    cells = [
        f"`{settings.name}` {runs[0]['changed']}".strip(),
        ", ".join(claims) if claimed else "–",
        f"{_spread(runs, 'test_acc')} (n = {len(runs)})",
        _spread(runs, "test_acc_exact"),
        _spread(runs, "test_acc_flip"),
        _spread(runs, "train_acc"),
        epochs if int(epochs) == settings.epochs else f"{epochs} of {settings.epochs}",
        f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s",
        "; ".join(sorted({f"{run['device']}, {run['precision']}" for run in runs})),
    ]
    return f"| {' | '.join(cells)} |\n"


def _spread(runs, column):
    """Mean and, of several runs, standard deviation (of a sample, so over n - 1)."""
    values = [float(run[column]) for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def write_tuning(name, outs, path):
    """Keeps what was tried to choose the settings of the recipe `name`, a row for each run.

    `outs`: folders of runs by `utils.train --validate`. Raises InputError for a run that was
    tested on the test images: they choose nothing.
    """
    rows = []
    for out in outs:
        metrics = read_metrics(out)
        settings, last = metrics["recipe"], metrics["last_epoch"]
        if not metrics["data"]["name"].endswith(data.HELD_OUT):
            raise InputError(f"{out} was tested on the test images; train it with --validate")
        plain = recipe(name).scaled(epochs=settings["epochs"])
        rows.append({
            "changed": "; ".join(_differences(settings, plain)),
            "data": metrics["data"]["name"].removesuffix(data.HELD_OUT),
            "seed": metrics["seed"],
            "epochs": settings["epochs"],
            "train_acc": last["train_acc"],
            "validation_acc": last["test_acc"],
            "seconds": metrics["training_seconds"],
            "device": metrics["device"],
            "precision": metrics["precision"],
        })
    training.write_csv(rows, path)


def tuning_table(name, folder=IMAGES):
    """The Markdown table of what was tried for the recipe `name`."""
    lines = ["| changed | images | epochs | train | validation | time |", "|---" * 6 + "|"]
    for row in read_csv(Path(folder, name, "tuning.csv")):
        accuracies = f"{float(row['train_acc']):.2f} | {float(row['validation_acc']):.2f}"
        changed = ", ".join(f"`{change}`" for change in row["changed"].split("; ") if change)
        lines.append(
            f"| {changed or '–'} | {row['data']} | {row['epochs']} | {accuracies} | "
            f"{float(row['seconds']) / 60:.0f} min |"
        )
    return "\n".join(lines) + "\n"


def speeds_table(path=SPEEDS):
    """The Markdown table of what `utils.benchmark --csv` measured."""
    rows = read_csv(path)
    head = f"| on {rows[0]['device']} | median | lowest | highest | |"
    lines = [head, "|---|---:|---:|---:|---|"]
    for row in rows:
        digits = 2 if row["unit"] in ("times", "ms/image") else 0
        numbers = (f"{float(row[name]):,.{digits}f}" for name in ("median", "lowest", "highest"))
        lines.append(f"| {row['what']} | {' | '.join(numbers)} | {row['unit']} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "results": results_table,
    "speeds": speeds_table,
    "tuning of s10_cpu": lambda: tuning_table("s10_cpu"),
}


def with_tables(text):
    """The README's `text` with each table as the files have it, between its two marks.

    Raises InputError where the marks are missing.
    """
    for name, table in TABLES.items():
        begin = f"<!-- {name}: python -m utils.record --table -->\n"
        end = f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise InputError(f"the README lacks the lines {begin.strip()} and {end.strip()}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def write_tables(readme=README):
    """Brings the tables in `readme` up to date."""
    text = with_tables(readme.read_text(encoding="utf-8"))
    with training.whole_file(readme) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
