"""The pages' tables, and the pictures that no run makes, of the files in images/.

`python -m utils.maintenance.tables` brings them up to date.
"""

from pathlib import Path

import pandas as pd

from utils import files, models, optimization, plotting, training
from utils.recipes import RECIPES, recipe

ROOT = Path(__file__).parents[2]
IMAGES = files.IMAGES


def markdown(head, rows):
    """Lists of cells, as texts, as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def results_table(folder=IMAGES):
    """The runs of what recipes.csv lists, with its source's claim; below them what has no run.

    A line's folder is that of the runs: the recipe's, or below it one for other settings.
    """
    head = ["recipe", "what", "claim: train / test", "test", "with flip", "train", "epochs", "time"]
    rows, without_run = [], []
    for folder_name, what, source in files.read_table(Path(folder, "recipes.csv")).values:
        name = folder_name.partition("/")[0]
        path = Path(folder, folder_name, "runs.csv")
        claimed = recipe(name).claimed
        claims = [f"{claimed[split]:.2f}" if split in claimed else "–"
                  for split in ("train", "test")]
        text = "&nbsp;/&nbsp;".join(claims) if claimed else "source"
        claim = f"[{text}]({source})" if source else "–"
        if path.exists():
            change, *cells = measured(files.read_table(path))
            rows.append([f"`{name}` {change}".strip(), what, claim, *cells])
        else:
            without_run.append([f"`python -m utils.train {name}`", what, claim])
    table = markdown(head, rows)
    if without_run:
        table += "\n" + markdown(["without a full run here", "what", "claim"], without_run)
    return table


def measured(runs):
    """What has changed in a recipe, and the results; of a DataFrame with a row for each run."""
    devices = runs["device"] + ", " + runs["precision"]
    devices = devices.str.replace(r" CPU, (\d+) thread\(s\)", r" ×\1", regex=True)
    time = f"{runs['seconds'].mean() / 60:.1f} min, "
    return [
        ", ".join(f"`{change}`" for change in runs["changed"][0].split("; ") if change),
        f"{spread(runs['test_acc'])} (n&nbsp;=&nbsp;{len(runs)})",
        spread(runs["test_acc_flip"]), spread(runs["train_acc"]), f"{runs['epochs'][0]}",
        time + "; ".join(sorted(set(devices))),
    ]


def spread(values):
    """The mean and, of several runs, the standard deviation (of a sample, so over n - 1)."""
    return plus_minus(values.mean(), values.std()) if len(values) > 1 else f"{values.mean():.2f}"


def plus_minus(value, error, sign=""):
    """A figure and its standard deviation or error, alike on all pages and pictures."""
    return f"{value:{sign}.2f} ± {error:.2f}"


def rungs(name="s10_best", folder=IMAGES):
    """The ladder of trials in tuning.csv: a DataFrame with a row for each rung, in their order.

    A rung is the trials with the same settings, one of each seed, and the last one those that
    it stands on, with test-time flip. `rung`, `on`, the number from 1 of the rung that it adds
    something to, and `kept` are what rungs.csv says of it; `accuracies` those of the seeds in
    percent, and `gain` the text of the difference of the means and its standard error. That is
    the same for all, from the spread of the seeds pooled over all rungs; for the flip, which
    compares the same networks, it is too large.
    """
    table = files.read_table(Path(folder, name, "rungs.csv"))
    trials = files.read_table(Path(folder, name, "tuning.csv"))
    by_rung = trials.groupby("changed", sort=False)
    accuracies = by_rung["validation_acc"].apply(list).to_list()
    flipped = by_rung["validation_acc_flip"].apply(list).to_list()
    accuracies.append(flipped[int(table["on"].iloc[-1]) - 1])
    error = (2 * by_rung["validation_acc"].var() / by_rung.size()).mean() ** 0.5
    means = [sum(each) / len(each) for each in accuracies]
    gains = ["–"]
    for mean, on in zip(means[1:], table["on"][1:], strict=True):
        gains.append(plus_minus(mean - means[int(on) - 1], error, "+"))
    return table.assign(accuracies=accuracies, mean=means, gain=gains)


def ladder_table(name="s10_best", folder=IMAGES):
    """What each rung brought to the one that it stands on."""
    return markdown(["", "rung", "stands on", "validation", "gain", "kept"], [
        [f"{number}", row.rung, row.on or "–", f"{row.mean:.2f}", row.gain, row.kept]
        for number, row in enumerate(rungs(name, folder).itertuples(), start=1)
    ])


def epoch_log(name, folder=IMAGES):
    """The log of a recorded run of the recipe `name`, the first by name."""
    path = min(Path(folder, name).glob("history_seed*.csv"))
    return f"```text\n{training.table(files.read_table(path).to_dict('records'))}\n```\n"


def accuracy_by_epoch(folder=IMAGES):
    """Plots the mean accuracy of each recipe's recorded runs, and behind it that of its source.

    The source of resnet9 is left out: it went on from trained weights.
    """
    histories = {}
    for name in RECIPES:
        runs = [files.read_table(path) for path in Path(folder, name).glob("history_seed*.csv")]
        if runs:
            merged = pd.concat(runs).groupby("epoch", as_index=False)
            histories[name] = merged["test_acc"].mean()
    published = files.read_table(Path(folder, "published.csv"))
    published = published[published["recipe"] != "resnet9"].groupby("recipe")
    return plotting.compare_curves(histories, dict(iter(published)))


def range_test(folder=IMAGES):
    """Plots the range test of s10 that range_test.csv holds, and the rates chosen from it."""
    found = files.read_table(Path(folder, "s10", "range_test.csv"))
    settings = recipe("s10")
    return plotting.lr_finder_curve(
        found["lr"], found["smoothed"], raw_losses=found["loss"],
        suggestion=optimization.suggested_lr(found),
        min_lr=settings.min_lr, max_lr=settings.max_lr,
    )


PAGES = {
    "README.md": {"results": results_table},
    "images/s10_best/README.md": {"ladder": ladder_table},
    "images/s12/README.md": {"log of s12": lambda: epoch_log("s12")},
}
PICTURES = {
    "accuracy.png": accuracy_by_epoch,
    "custom_resnet.png": lambda: plotting.network(models.CustomResNet()),
    "s10/lr_finder.png": range_test,
    "s10_best/ladder.png": lambda: plotting.ladder(rungs()),
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
    """Brings the tables of all pages, and the pictures that no run makes, up to date."""
    for page, tables in PAGES.items():
        text = Path(root, page).read_text(encoding="utf-8")
        files.save_text(with_tables(text, tables), Path(root, page))
    plotting.use_style()
    for name, picture in PICTURES.items():
        files.save_figure(picture().figure, Path(root, "images", name))


if __name__ == "__main__":
    write()
