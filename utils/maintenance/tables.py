"""The pages' tables and the README's first picture, made of the files in images/.

`python -m utils.maintenance.tables` brings them up to date.
"""

from pathlib import Path

import pandas as pd

from utils import files, plotting, training
from utils.recipes import RECIPES, recipe

ROOT = Path(__file__).parents[2]
IMAGES = files.IMAGES


def markdown(head, rows):
    """Lists of cells, as texts, as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def results(folder=IMAGES):
    """What recipes.csv lists: a recipe, what its source claims, and its runs where there are some.

    A line's folder is that of the runs: the recipe's, or below it one for other settings.
    """
    head = ["recipe", "what", "claim: train / test", "test", "with flip", "train", "epochs", "time"]
    rows = []
    for name, what, source in files.read_table(Path(folder, "recipes.csv")).values:
        settings, path = recipe(name.partition("/")[0]), Path(folder, name, "runs.csv")
        none = ["", "not yet", "–", "–", "–", "–"]
        change, *cells = measured(settings, files.read_table(path)) if path.exists() else none
        claims = [f"{settings.claimed[split]:.2f}" if split in settings.claimed else "–"
                  for split in ("train", "test")]
        claim = f"[{'&nbsp;/&nbsp;'.join(claims)}]({source})" if source else "–"
        rows.append([f"`{settings.name}` {change}".strip(), what, claim, *cells])
    return markdown(head, rows)


def measured(settings, runs):
    """What has changed in a recipe, and the results; of a DataFrame with a row for each run."""
    devices = runs["device"] + ", " + runs["precision"]
    devices = devices.str.replace(r" CPU, (\d+) thread\(s\)", r" ×\1", regex=True)
    epochs, time = runs["epochs"][0], f"{runs['seconds'].mean() / 60:.1f} min, "
    return [
        code(runs["changed"][0]), f"{spread(runs['test_acc'])} (n = {len(runs)})",
        spread(runs["test_acc_flip"]), spread(runs["train_acc"]),
        f"{epochs}" if epochs == settings.epochs else f"{epochs} of {settings.epochs}",
        time + "; ".join(sorted(set(devices))),
    ]


def spread(values):
    """Mean and, of several runs, standard deviation (of a sample, so over n - 1)."""
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def code(changes):
    """Settings as the files hold them, "a=1; b=2", as code."""
    return ", ".join(f"`{change}`" for change in changes.split("; ") if change)


def tuning(name, folder=IMAGES):
    """What was tried for the recipe `name`."""
    rows = files.read_table(Path(folder, name, "tuning.csv")).itertuples()
    return markdown(["changed", "images", "epochs", "train", "validation", "time"], [
        [code(row.changed) or "–", row.data, f"{row.epochs}", f"{row.train_acc:.2f}",
         f"{row.validation_acc:.2f}", f"{row.seconds / 60:.0f} min"]
        for row in rows
    ])


def rungs(name="s10_best", folder=IMAGES):
    """The ladder of trials in tuning.csv: a DataFrame with a row for each rung, in their order.

    A rung is the trials with the same settings, one of each seed, and the last one those that
    were kept last, with test-time flip. `rung` and `kept` are what rungs.csv says of it,
    `accuracies` those of the seeds in percent, `gain` the mean difference to the rung that was
    kept last, seed by seed, and `error` its standard error.
    """
    trials = files.read_table(Path(folder, name, "tuning.csv")).groupby("changed", sort=False)
    by_rung = [runs.sort_values("seed") for _, runs in trials]
    table = files.read_table(Path(folder, name, "rungs.csv"))
    last, accuracies, gains = by_rung[0], [], []
    for runs, kept in zip(by_rung, table["kept"], strict=False):
        accuracies.append(runs["validation_acc"].to_numpy())
        gains.append(accuracies[-1] - last["validation_acc"].to_numpy())
        last = runs if kept == "yes" else last
    accuracies.append(last["validation_acc_flip"].to_numpy())
    gains.append(accuracies[-1] - last["validation_acc"].to_numpy())
    return table.assign(
        accuracies=accuracies, gain=[gain.mean() for gain in gains],
        error=[gain.std(ddof=1) / len(gain) ** 0.5 for gain in gains],
    )


def gains(name="s10_best", folder=IMAGES):
    """What each rung brought; "undecided" where that is less than two standard errors."""
    rows = []
    for row in rungs(name, folder).itertuples():
        verdict = "helps" if row.gain > 0 else "harms"
        verdict = verdict if abs(row.gain) >= 2 * row.error else "undecided"
        gain = [f"{row.gain:+.2f} ± {row.error:.2f}", verdict, row.kept] if rows else ["–"] * 3
        rows.append([row.rung, f"{row.accuracies.mean():.2f}", *gain])
    return markdown(["rung", "validation", "gain", "", "kept"], rows)


def log(name, folder=IMAGES):
    """The log of a recorded run of the recipe `name`, the first by name."""
    path = min(Path(folder, name).glob("history_seed*.csv"))
    return f"```text\n{training.table(files.read_table(path).to_dict('records'))}\n```\n"


def speeds(folder=IMAGES):
    """What `utils.maintenance.benchmark --record` measured."""
    table = files.read_table(Path(folder, "benchmark", "speeds.csv"))
    rows = []
    for row in table.itertuples():
        digits = 2 if row.unit in ("times", "ms/image") else 0
        numbers = (f"{value:,.{digits}f}" for value in (row.median, row.lowest, row.highest))
        rows.append([row.what, *numbers, row.unit])
    return markdown([f"on {table['device'][0]}", "median", "lowest", "highest", ""], rows)


def accuracy_by_epoch(folder=IMAGES):
    """Plots the mean accuracy of each recipe's recorded runs, and behind it that of its source.

    Shortened runs are left out, and resnet9's source, which went on from trained weights.
    """
    histories = {}
    for name in RECIPES:
        runs = [files.read_table(path) for path in Path(folder, name).glob("history_seed*.csv")]
        if runs and len(runs[0]) == recipe(name).epochs:
            mean = pd.concat(runs).groupby("epoch", as_index=False)["test_acc"].mean()
            histories[name] = mean.to_dict("records")
    published = files.read_table(Path(folder, "published.csv")).groupby("recipe")
    sources = {name: rows.to_dict("records") for name, rows in published if name != "resnet9"}
    plotting.use_style()
    return plotting.compare_curves(histories, sources)


PAGES = {
    "README.md": {"results": results, "log of s12": lambda: log("s12")},
    "images/s10/README.md": {"tuning of s10": lambda: tuning("s10")},
    "images/s10_best/README.md": {"ladder": gains},
    "images/s10_cpu/README.md": {"tuning of s10_cpu": lambda: tuning("s10_cpu")},
    "images/benchmark/README.md": {"speeds": speeds},
}


def with_tables(text, tables):
    """A page's `text` with each of its tables, {name: function}, between its two marks."""
    for name, table in tables.items():
        begin = f"<!-- {name}: python -m utils.maintenance.tables -->\n"
        end = f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def write(root=ROOT):
    """Brings the tables of all pages and images/accuracy.png up to date."""
    for page, tables in PAGES.items():
        text = Path(root, page).read_text(encoding="utf-8")
        files.save_text(with_tables(text, tables), Path(root, page))
    files.save_figure(accuracy_by_epoch().figure, Path(root, "images", "accuracy.png"))
    files.save_figure(plotting.ladder(rungs()).figure, Path(root, "images/s10_best/ladder.png"))


if __name__ == "__main__":
    write()
