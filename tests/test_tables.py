"""The pages' tables and pictures, of files made by hand."""

from utils import files
from utils.maintenance import tables

RUN = {
    "recipe": "s10", "changed": "", "epochs": 24, "train_acc": 98.5, "test_acc": 93,
    "test_acc_flip": 93.5, "seconds": 90, "device": "A", "precision": "float32",
}


def write_runs(folder, *runs):
    files.save_table(runs, folder / runs[0]["recipe"] / "runs.csv")


def test_results(tmp_path):
    """In the order of recipes.csv; the spread is that of a sample; below what has no run."""
    (tmp_path / "recipes.csv").write_text(
        "folder,what,source\ns10,first,a.b/c\ns10/other,\"x, y\",\ns10_cpu,small,\ns12,last,d\n"
        "resnet9,other,e\n"
    )
    write_runs(tmp_path, {**RUN, "recipe": "s12", "epochs": 5, "seconds": 3000})
    write_runs(tmp_path, RUN, {**RUN, "test_acc": 94, "train_acc": 98.6, "seconds": 102,
                               "device": "B CPU, 12 thread(s)"})
    files.save_table([{**RUN, "changed": "cutout=0; loop=x"}], tmp_path / "s10/other/runs.csv")
    rows = [
        "| recipe | what | claim: train / test | test | with flip | train | epochs | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `s10` | first | [98.60&nbsp;/&nbsp;93.07](a.b/c) | 93.50 ± 0.71 (n&nbsp;=&nbsp;2) "
        "| 93.50 ± 0.00 | 98.55 ± 0.07 | 24 | 1.6 min, A, float32; B ×12, float32 |",
        "| `s10` `cutout=0`, `loop=x` | x, y | – | 93.00 (n&nbsp;=&nbsp;1) | 93.50 | 98.50 | 24 "
        "| 1.5 min, A, float32 |",
        "| `s12` | last | [source](d) | 93.00 (n&nbsp;=&nbsp;1) | 93.50 | 98.50 | 5 "
        "| 50.0 min, A, float32 |",
    ]
    without_run = [
        "| without a full run here | what | claim |",
        "| --- | --- | --- |",
        "| `python -m utils.train s10_cpu` | small | – |",
        "| `python -m utils.train resnet9` | other | [–&nbsp;/&nbsp;90.71](e) |",
    ]
    assert tables.results_table(tmp_path).splitlines() == [*rows, "", *without_run]
    for name in ("s10_cpu", "resnet9"):
        write_runs(tmp_path, {**RUN, "recipe": name})
    assert without_run[0] not in tables.results_table(tmp_path)


def test_ladder_compares_each_rung_with_the_one_it_stands_on(tmp_path):
    """The variances of the four pairs, of one degree of freedom each: 0.5, 2, 4.5, 1."""
    trials = [
        {"changed": changed, "seed": seed, "validation_acc": plain, "validation_acc_flip": flipped}
        for changed, seed, plain, flipped in [
            ("a=1; b=2", 0, 50, 0), ("a=1; b=2", 1, 51, 0),
            ("b=2", 0, 53, 54), ("b=2", 1, 55, 57.5),
            ("", 0, 52, 0), ("", 1, 55, 0), ("c=3", 0, 52, 0), ("c=3", 1, 52 + 2**0.5, 0),
        ]
    ]
    files.save_table(trials, tmp_path / "s10_best" / "tuning.csv")
    titles = [("plain", "", "yes"), ("a", 1, "yes"), ("b", 2, "no"), ("c", 3, "no"),
              ("flip", 2, "yes")]
    rows = [{"rung": name, "on": on, "kept": kept} for name, on, kept in titles]
    files.save_table(rows, tmp_path / "s10_best" / "rungs.csv")
    assert tables.ladder_table(folder=tmp_path).splitlines() == [
        "|  | rung | stands on | validation | gain | kept |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 | plain | – | 50.50 | – | yes |",
        "| 2 | a | 1 | 54.00 | +3.50 ± 1.41 | yes |",
        "| 3 | b | 2 | 53.50 | -0.50 ± 1.41 | no |",
        "| 4 | c | 3 | 52.71 | -0.79 ± 1.41 | no |",
        "| 5 | flip | 2 | 55.75 | +1.75 ± 1.41 | yes |",
    ]


def history(*accuracies):
    return [
        {"epoch": epoch, "lr": 0.01, "train_loss": 1, "train_acc": 50, "test_loss": 2,
         "test_acc": accuracy, "images_per_s": 1234, "seconds": 1.5}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def test_a_log_is_that_of_the_first_run_as_it_was_printed(tmp_path):
    for seed, accuracy in ((1, 20), (0, 10.126)):
        files.save_table(history(accuracy), tmp_path / "s12" / f"history_seed{seed}.csv")
    assert tables.epoch_log("s12", tmp_path).splitlines() == [
        "```text",
        "epoch        lr  train loss  train acc  test loss  test acc  images/s      time",
        "    1  0.010000      1.0000    50.00 %     2.0000   10.13 %     1,234     1.5 s",
        "```",
    ]


def test_the_picture_has_means_of_the_runs_and_their_sources(tmp_path, monkeypatch):
    """But no source that began with trained weights."""
    for seed, rise in enumerate((3, 4)):
        rows = history(*(rise * epoch for epoch in range(10)))
        files.save_table(rows, tmp_path / "s10_cpu" / f"history_seed{seed}.csv")
    published = [{"recipe": "s10", "epoch": 1, "test_acc": 9.5},
                 {"recipe": "resnet9", "epoch": 1, "test_acc": 8.5}]
    files.save_table(published, tmp_path / "published.csv")
    monkeypatch.setattr(tables.plotting, "compare_curves", lambda *curves: curves)
    runs, sources = (
        {name: rows.to_dict("records") for name, rows in curves.items()}
        for curves in tables.accuracy_by_epoch(tmp_path)
    )
    assert runs == {"s10_cpu": [{"epoch": 1 + i, "test_acc": 3.5 * i} for i in range(10)]}
    assert sources == {"s10": [{"recipe": "s10", "epoch": 1, "test_acc": 9.5}]}


def test_tables_replace_the_old_ones_alone(tmp_path, monkeypatch):
    pages = {"README.md": {"first": lambda: "| a |\n", "second": lambda: "| b |\n"},
             "images/s10/README.md": {"third": lambda: "| c |\n"}}
    monkeypatch.setattr(tables, "PAGES", pages)
    monkeypatch.setattr(tables, "PICTURES", {})
    place = "# Ä\n<!-- {0}: python -m utils.maintenance.tables -->\n{1}<!-- end of {0} -->\nrest\n"
    for page, contents in pages.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        old = "".join(place.format(name, "old\n") for name in contents)
        (tmp_path / page).write_text(old, encoding="utf-8")
    for _ in range(2):
        tables.write(tmp_path)
        for page, contents in pages.items():
            new = "".join(place.format(name, f"\n{table()}\n") for name, table in contents.items())
            assert (tmp_path / page).read_text(encoding="utf-8") == new


def test_the_pictures_that_no_run_makes_are_drawn_with_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PAGES", {})
    tables.write(tmp_path)
    for name in ("accuracy.png", "custom_resnet.png", "s10/lr_finder.png", "s10_best/ladder.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
