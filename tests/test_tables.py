"""The README's tables of files made by hand."""

import pytest

from utils import InputError, files
from utils.maintenance import tables

RUN = {
    "recipe": "s10", "changed": "", "epochs": 24, "train_acc": 98.5, "test_acc": 93,
    "test_acc_flip": 93.5, "seconds": 90, "device": "A", "precision": "float32",
}


def write_runs(folder, *runs):
    files.save_table(runs, folder / runs[0]["recipe"] / "runs.csv")


def test_results(tmp_path):
    """In the order of the recipes; the spread is that of a sample."""
    write_runs(tmp_path, {**RUN, "recipe": "s12", "epochs": 5, "changed": "cutout=0",
                          "seconds": 3000})
    write_runs(tmp_path, RUN, {**RUN, "test_acc": 94, "train_acc": 98.6, "seconds": 100.4,
                               "device": "B"})
    write_runs(tmp_path, {**RUN, "recipe": "resnet9"})
    assert tables.results(tmp_path).splitlines()[1:] == [
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `s10` | 98.60, 93.07 | 93.50 ± 0.71 (n = 2) | 93.50 ± 0.00 "
        "| 98.55 ± 0.07 | 24 | 95.2 s | A, float32; B, float32 |",
        "| `s12` cutout=0 | – | 93.00 (n = 1) | 93.50 | 98.50 | 5 of 24 | 50 min | A, float32 |",
        "| `resnet9` | –, 90.71 | 93.00 (n = 1) | 93.50 | 98.50 | 24 | 90.0 s | A, float32 |",
    ]


def test_speeds(tmp_path):
    rows = [
        {"device": "D", "what": "a", "unit": "images/s", "median": 1234.6, "lowest": 1.0,
         "highest": 2000},
        {"device": "D", "what": "b", "unit": "times", "median": 20.126, "lowest": 2, "highest": 3},
    ]
    files.save_table(rows, tmp_path / "benchmark" / "speeds.csv")
    assert tables.speeds(tmp_path).splitlines() == [
        "| on D | median | lowest | highest |  |",
        "| --- | --- | --- | --- | --- |",
        "| a | 1,235 | 1 | 2,000 | images/s |",
        "| b | 20.13 | 2.00 | 3.00 | times |",
    ]


def test_tables_replace_the_old_ones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"first": lambda: "| a |\n", "second": lambda: "| b |\n"})
    readme = tmp_path / "README.md"
    marks = [
        (f"<!-- {name}: python -m utils.maintenance.tables -->\n", f"<!-- end of {name} -->\n")
        for name in tables.TABLES
    ]
    old = "# Ä\n{}old\n{}between\n{}{}rest\n".format(*marks[0], *marks[1])
    readme.write_text(old, encoding="utf-8")
    new = "# Ä\n{}\n| a |\n\n{}between\n{}\n| b |\n\n{}rest\n"
    for _ in range(2):
        tables.write(readme)
        assert readme.read_text(encoding="utf-8") == new.format(*marks[0], *marks[1])


@pytest.mark.parametrize("text", [
    "nothing", "<!-- end of results -->\n<!-- results: python -m utils.maintenance.tables -->\n",
])
def test_no_place_for_a_table(text):
    with pytest.raises(InputError, match=r"README lacks the lines <!-- results"):
        tables.with_tables(text)
