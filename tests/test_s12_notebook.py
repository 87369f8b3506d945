"""The notebook S12 in the hands of a reader whose machine trains, and what its prose states."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
from scipy.stats import binomtest, chi2

from tests.conftest import (
    Reader,
    assert_a_run_of_its_own,
    assert_same_state,
    training_machine,
    without_times,
    write_folder,
)
from utils import (
    data,
    demo,
    explain,
    files,
    lightning_loop,
    models,
    notebook,
    results,
    training,
)

LOAD = data.load
PATH = Path(__file__).parents[1] / "S12_lightning.ipynb"
# What the cells are told by.
SETTINGS, EXERCISE = 'notebook.begin("s12")', "# Change the recipe here"
FIT, LOG, ERRORS = "run.train_lightning(\n        recipe", "read_log(folder)", "confusion_matrix("
LAST = "from utils import demo"
BOTH_LOOPS = ["few = data.builtin_sample()", "the same weights, bit for bit", "update_bn(batches"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with training_machine("s12", tmp_path_factory.mktemp("runs")) as patch:
        yield patch


def new_reader():
    """Without the comparison of the two loops, which other tests make and which takes long."""
    reader = Reader(PATH)
    for text in BOTH_LOOPS:
        reader.cells[reader.place(text)] = ""
    return reader


@pytest.fixture(scope="module")
def reader(machine):
    """After all cells have run from top to bottom."""
    reader = new_reader()
    reader.run()
    return reader


@pytest.fixture
def another_kernel(machine, tmp_path, monkeypatch):
    """A function that gives a reader with an empty folder for runs, where the settings are made."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))

    def start(exercise=""):
        reader = new_reader()
        reader.edit(EXERCISE, f"{exercise}\n{EXERCISE}")
        reader.run(last=SETTINGS)
        return reader

    return start


def test_one_accuracy_everywhere(reader):
    names = reader.names
    last = names["history"][-1]
    assert 20 < last["test_acc"] < 90  # of ten classes it has learnt some
    assert names["results"].accuracy == pytest.approx(last["test_acc"], abs=1e-4)
    model = models.load_weights(names["folder"] / "weights.safetensors")
    assert_same_state(model, names["model"])
    asked = explain.predictions(model, names["images"])
    torch.testing.assert_close(asked.logits, names["results"].logits)
    assert names["log"]["test_acc"].dropna().tolist() == pytest.approx(
        [row["test_acc"] for row in names["history"]], abs=1e-4
    )
    assert names["chosen"][-1]["val_acc"] == max(row["val_acc"] for row in names["history"])


def test_this_run_stands_beside_the_recorded_ones(reader):
    column = reader.names["table"]["this run"]
    assert column["test accuracy, %"] == reader.names["history"][-1]["test_acc"]
    assert column["epochs"] == 4


def test_colab_opens_the_page_of_this_run(reader, monkeypatch):
    page = mock.Mock()
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(demo, "page", page)
    reader.run("demo.page(")
    weights = reader.names["folder"] / "weights.safetensors"
    assert weights.is_file()
    assert page.mock_calls == [mock.call(weights, "few-shapes"), mock.call().launch()]


def test_later_cells_do_the_same_whenever_they_are_run(reader, capsys):
    """Twice each, and once more in the order in which a reader goes back."""
    state, history = copy.deepcopy(reader.names["model"]), without_times(reader.names["history"])
    printed = {}
    later = list(range(reader.place(FIT), len(reader.cells)))
    for place in [*(each for cell in later for each in (cell, cell)), *reversed(later)]:
        reader.run_place(place)
        out = capsys.readouterr().out
        assert printed.setdefault(place, out) == out, reader.cells[place]
    assert_same_state(reader.names["model"], state)
    assert without_times(reader.names["history"]) == history


@pytest.mark.parametrize("epoch, hook", [
    (0, "training_step"), (2, "training_step"), (2, "validation_step"),
])
def test_interrupted_and_run_again_it_ends_as_it_would_have(
    epoch, hook, another_kernel, reader, monkeypatch
):
    other = another_kernel()
    does = getattr(lightning_loop.Classifier, hook)

    def interrupted(module, *args):
        if module.current_epoch == epoch and (hook == "validation_step" or args[1] == 4):
            raise KeyboardInterrupt
        return does(module, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lightning_loop.Classifier, hook, interrupted)
        other.run(FIT)
    other.run(FIT, ERRORS)
    assert without_times(other.names["history"]) == without_times(reader.names["history"])
    assert_same_state(other.names["model"], reader.names["model"])


def test_a_changed_recipe_is_a_run_of_its_own(another_kernel):
    change = "recipe = recipe.scaled(epochs=2).replace(rotation=0)"
    first = assert_a_run_of_its_own(another_kernel, EXERCISE, SETTINGS, FIT, change)
    assert files.read_checkpoint(first / "last.ckpt")["identity"]["recipe"]["rotation"] == 5


def test_a_run_of_fewer_steps_than_any_logging_interval(another_kernel):
    other = another_kernel("recipe = recipe.scaled(epochs=1, batch_size=200)")
    other.run(last=LOG)
    assert other.names["log"]["lr"].count() == 1


@pytest.mark.parametrize("train", ["", "1"])
def test_another_folder_is_trained_on(train, another_kernel, tmp_path, monkeypatch, capsys):
    """Without a GPU shortened, unless it is told to train; never with CIFAR-10's results."""
    pictures = write_folder(tmp_path / "pictures", train=20, test=12)
    monkeypatch.setenv("COURSE_DATA", str(pictures))
    monkeypatch.setenv("COURSE_TRAIN", train)
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr(notebook, "CPU_EPOCHS", 3)
    other = another_kernel()
    says = "no recorded run on these images: 3 of 4 epochs are trained"
    assert (says in capsys.readouterr().out) == (not train)
    other.run(SETTINGS, LAST)
    assert len(other.names["history"]) == (4 if train else 3)
    assert other.names["results"].classes == ("blue", "green", "red")
    assert len(other.names["results"].labels) == 36


def test_a_finished_run_leaves_no_bar_open(reader, monkeypatch):
    """Else it is drawn into whatever is printed next."""
    bar = mock.Mock()
    monkeypatch.setattr(training, "begin_table", lambda *_, **__: bar)
    reader.run(FIT)
    bar.close.assert_called_once_with()


def figures_on_file():
    """Every figure of two decimals that the prose may state, as a text."""
    s10, s12 = (
        files.read_table(files.IMAGES / name / "history_seed0.csv") for name in ("s10", "s12")
    )
    first, second = (
        results.read_predictions(files.IMAGES / name / "predictions.safetensors")
        for name in ("s10", "s12")
    )
    ends = [rows.iloc[-1] for rows in (s10, s12)]
    gaps = [end["train_acc"] - end["test_acc"] for end in ends]
    alone = [(a.right & ~b.right).sum().item() for a, b in [(first, second), (second, first)]]
    errors = {}
    for part, count in [("val", 5000), ("test", 10000)]:
        share = ends[1][f"{part}_acc"] / 100
        errors[part] = 100 * (share * (1 - share) / count) ** 0.5
    columns = [c for c in s12 if c.endswith(("_acc", "_loss"))]
    values = [
        *gaps, *s12[columns].to_numpy().flatten(), *(end["test_acc"] for end in ends),
        ends[0]["train_acc"] - ends[1]["train_acc"], ends[0]["test_acc"] - ends[1]["test_acc"],
        ends[1]["val_acc"] - ends[1]["test_acc"], ends[1]["test_acc"] - s12["test_acc"][10],
        first.accuracy, second.accuracy, first.calibration_error, second.calibration_error,
        *(100 * each.confidences.mean().item() for each in (first, second)),
        binomtest(alone[0], sum(alone)).pvalue, *errors.values(), sum(alone) ** 0.5 / 100,
        (sum(each.accuracy * (100 - each.accuracy) for each in (first, second)) / 10000) ** 0.5,
        first.accuracy - second.accuracy, (errors["val"] ** 2 + errors["test"] ** 2) ** 0.5,
        512 / 456,
    ]
    return {f"{value:.2f}" for value in values} | {"0.05", "0.50"}


def test_figures_in_the_prose_are_those_on_file():
    notebook = nbformat.read(PATH, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"```.*?```|`.*?`", "", prose, flags=re.DOTALL)
    stated = set(re.findall(r"(?<![\d.,/])\d+\.\d\d(?![\d.])", prose))
    assert len(stated) > 25 and stated <= figures_on_file(), stated - figures_on_file()


def test_counts_in_the_prose_are_those_on_file():
    notebook = nbformat.read(PATH, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    s12 = files.read_table(files.IMAGES / "s12" / "history_seed0.csv")
    minutes = files.read_table(files.IMAGES / "s12" / "runs.csv")["seconds"][0] / 60
    first, second = (
        results.read_predictions(files.IMAGES / name / "predictions.safetensors")
        for name in ("s10", "s12")
    )
    wrong = (~second.right).sum()
    (sure10, all10), (sure, all12) = (
        ((~each.right & (each.confidences > 0.9)).sum(), (each.confidences > 0.9).sum())
        for each in (first, second)
    )
    alone = [(a.right & ~b.right).sum().item() for a, b in [(first, second), (second, first)]]
    cat, dog = (second.classes.index(name) for name in ("cat", "dog"))
    cats, dogs = second.confusion[cat, dog], second.confusion[dog, cat]
    animals = torch.tensor([name in "bird cat deer dog frog horse" for name in second.classes])
    same = animals[:, None] == animals
    errors = second.confusion.clone().fill_diagonal_(0)
    predicted = second.confusion.sum(0)
    shown = second.confidences[second.misclassified(10)]
    surer10, surer = (
        100 * (each.confidences[each.right, None] > each.confidences[~each.right]).float().mean()
        for each in (first, second)
    )
    one = first.labels[first.right & ~second.right].bincount(minlength=10)
    other = first.labels[second.right & ~first.right].bincount(minlength=10)
    uneven = ((one - other) ** 2 / (one + other)).sum()
    above = (s12["val_acc"] > s12["test_acc"]).sum()
    for text in (
        f"bfloat16 instructions; its 24 epochs trained for {minutes:.0f} minutes",
        f"from {s12['images_per_s'][2]:.0f} images per second in epoch 3 to "
        f"{s12['images_per_s'][7]:.0f} in epoch 8, and is {s12['images_per_s'][9:].min():.0f} and",
        f"In {above} of the {len(s12)} epochs of the stored run the validation accuracy is above",
        f"with {cats + dogs} of the {wrong} mistakes: {cats} cats are called dogs, and {dogs} dogs",
        f"Cats are the hardest class ({second.per_class['cat']:.1f} % right), automobiles the "
        f"easiest ({second.per_class['automobile']:.1f} %)",
        f"Most mistakes, {errors[same].sum()}, stay among",
        f"lie between {predicted.min()} and {predicted.max():,}",
        f"Of all {wrong} mistakes only {sure} are made with more than 90 %. But this network "
        f"is more than 90 % sure in only {all12:,} of its 10,000 answers",
        f"only {sure} mistakes of S12 lie above 90 %, and {sure10} of S10",
        f"with {all12:,} answers above 90 % against {all10:,}",
        f"in {surer10:.0f} of 100 such pairs for S10, and in {surer:.0f} for S12",
        f"{uneven:.1f} or more in only {1000 * chi2.sf(uneven, 10):.0f} of 1,000 cases",
        f"On {sum(alone)} images exactly one of the networks is right, and these are divided "
        f"{alone[0]} to {alone[1]}",
    ):
        assert text in prose
    assert min(second.per_class, key=second.per_class.get) == "cat"
    assert max(second.per_class, key=second.per_class.get) == "automobile"
    assert (shown < 0.5).sum() == 5  # "In five of these ten"
    assert round(100 * (s12["test_acc"][23] - second.accuracy)) == 3  # "three fewer"
    assert s12["val_acc"].idxmax() == 23 and s12["val_acc"][:13].idxmax() == 10
    assert s12["val_acc"][11:14].max() < s12["val_acc"][10]  # where early stopping would stop


def test_the_stored_run_is_the_recorded_one():
    cells = nbformat.read(PATH, as_version=4).cells
    text = "\n".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    history = files.read_table(files.IMAGES / "s12" / "history_seed0.csv").to_dict("records")
    assert training.table(history) in text
