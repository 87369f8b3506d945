"""The README's tables, made of the files in images/: `python -m utils.maintenance.tables`."""

from pathlib import Path

from utils import InputError, files
from utils.recipes import RECIPES, recipe

ROOT = Path(__file__).parents[2]
IMAGES = files.IMAGES
README = ROOT / "README.md"


def markdown(head, rows):
    """Lists of cells, as texts, as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def results(folder=IMAGES):
    """All recipes with a runs.csv in `folder`, in the order of RECIPES."""
    head = [
        "recipe", "source's claim: train, test", "test", "with test-time flip", "train", "epochs",
        "training time", "on",
    ]
    paths = {name: Path(folder, name, "runs.csv") for name in RECIPES}
    return markdown(head, [
        result_cells(recipe(name), files.read_table(path))
        for name, path in paths.items() if path.exists()
    ])


def result_cells(settings, runs):
    """A recipe's line, of a DataFrame with a row for each of its runs."""
    claims = [f"{settings.claimed[name]:.2f}" if name in settings.claimed else "–"
              for name in ("train", "test")]
    epochs, seconds = runs["epochs"][0], runs["seconds"].mean()
    return [
        f"`{settings.name}` {runs['changed'][0]}".strip(),
        ", ".join(claims) if settings.claimed else "–",
        f"{spread(runs['test_acc'])} (n = {len(runs)})",
        spread(runs["test_acc_flip"]),
        spread(runs["train_acc"]),
        f"{epochs}" if epochs == settings.epochs else f"{epochs} of {settings.epochs}",
        f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s",
        "; ".join(sorted(set(runs["device"] + ", " + runs["precision"]))),
    ]


def spread(values):
    """Mean and, of several runs, standard deviation (of a sample, so over n - 1)."""
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def tuning(name, folder=IMAGES):
    """What was tried for the recipe `name`."""
    rows = files.read_table(Path(folder, name, "tuning.csv")).itertuples()
    return markdown(["changed", "images", "epochs", "train", "validation", "time"], [
        [
            ", ".join(f"`{change}`" for change in row.changed.split("; ") if change) or "–",
            row.data, f"{row.epochs}", f"{row.train_acc:.2f}", f"{row.validation_acc:.2f}",
            f"{row.seconds / 60:.0f} min",
        ]
        for row in rows
    ])


def speeds(folder=IMAGES):
    """What `utils.maintenance.benchmark --record` measured."""
    table = files.read_table(Path(folder, "benchmark", "speeds.csv"))
    rows = []
    for row in table.itertuples():
        digits = 2 if row.unit in ("times", "ms/image") else 0
        numbers = (f"{value:,.{digits}f}" for value in (row.median, row.lowest, row.highest))
        rows.append([row.what, *numbers, row.unit])
    return markdown([f"on {table['device'][0]}", "median", "lowest", "highest", ""], rows)


TABLES = {
    "results": results,
    "speeds": speeds,
    "tuning of s10_cpu": lambda: tuning("s10_cpu"),
}


def with_tables(text):
    """The README's `text` with each table as the files have it, between its two marks.

    Raises InputError where the marks are missing.
    """
    for name, table in TABLES.items():
        begin = f"<!-- {name}: python -m utils.maintenance.tables -->\n"
        end = f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise InputError(f"the README lacks the lines {begin.strip()} and {end.strip()}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def write(readme=README):
    """Brings the tables in `readme` up to date."""
    files.save_text(with_tables(readme.read_text(encoding="utf-8")), readme)


if __name__ == "__main__":
    write()
