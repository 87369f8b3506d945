"""The notebook S10 in the hands of a reader whose machine trains."""

import copy
import itertools
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.conftest import (
    Reader,
    assert_a_run_of_its_own,
    assert_same_state,
    cut_off_after,
    training_machine,
    without_times,
    write_folder,
)
from utils import (
    data,
    devices,
    explain,
    files,
    models,
    notebook,
    optimization,
    plotting,
    recipes,
    run,
    training,
)
from utils.maintenance import benchmark

PATH = Path(__file__).parents[1] / "S10_custom_resnet.ipynb"
# What the cells are told by.
SETTINGS, EXERCISE = 'notebook.begin("s10")', "# Change the recipe here"
RANGE_TEST, SHORT_RUNS, SCHEDULE = "lr_range_test(", "hold_out(", "one_cycle_rates(recipe"
FIT, TARGET, LAST = "model, history = run.train_plain(", "target':>10", "plotting.ladder("
LOSSES, DECAYS = "plotting.loss_curves(", "decays = {\n"
PHASES = {"input": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with training_machine("s10", tmp_path_factory.mktemp("runs")) as patch:
        patch.setattr(benchmark, "own_process", lambda *_, **__: {p: [PHASES[p]] for p in PHASES})
        yield patch


@pytest.fixture(scope="module")
def reader(machine):
    """After all cells have run from top to bottom."""
    reader = Reader(PATH)
    reader.run()
    return reader


@pytest.fixture
def another_kernel(machine, tmp_path, monkeypatch):
    """A function that gives a reader with an empty folder for runs, where the settings are made."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))

    def start(exercise=""):
        reader = Reader(PATH)
        reader.edit(EXERCISE, f"{exercise}\n{EXERCISE}")
        reader.run(last=SETTINGS)
        return reader

    return start


def test_one_accuracy_everywhere(reader):
    names = reader.names
    results, last = names["results"], names["history"][-1]
    assert 20 < last["test_acc"] < 90  # of ten classes it has learnt some
    assert results.accuracy == last["test_acc"]
    assert explain.predictions(names["model"], names["images"]).accuracy == last["test_acc"]
    assert last["epoch"] == names["recipe"].epochs == 4


def test_a_question_gets_the_answer_of_the_evaluation(reader):
    asked = explain.predictions(reader.names["model"], reader.names["images"])
    torch.testing.assert_close(asked.logits, reader.names["results"].logits)


def test_rows_of_the_confusion_matrix_are_the_classes(reader):
    results, labels = reader.names["results"], reader.names["images"].test_labels
    assert torch.equal(results.confusion.sum(1), labels.bincount())


def test_a_target_that_is_not_reached_is_told_so(reader, capsys):
    reader.run(TARGET)
    printed = capsys.readouterr().out
    assert re.search(r"^over 90 % from epoch .* not reached$", printed, re.MULTILINE)
    assert f"{reader.names['last']['test_acc']:.2f} %\n" in printed


@pytest.mark.parametrize("name", ["s10_best", "s12", "resnet9"])
def test_the_target_and_the_claim_stay_those_of_the_assignment(reader, name, capsys):
    other = Reader(PATH)
    other.names |= {**reader.names, "recipe": recipes.recipe(name)}
    other.run(TARGET)
    assert re.search(r"^test accuracy +90 % +93.07 %", capsys.readouterr().out, re.MULTILINE)


def test_a_picture_of_ones_own_in_colab(reader, monkeypatch, tmp_path):
    """Or, where that is cancelled, the one that is there."""
    mine = tmp_path / "mine.png"
    Image.new("RGB", (40, 30), "teal").save(mine)
    for uploaded, asked in (({str(mine): b""}, "mine.png"), ({}, "custom_resnet.png")):
        colab = SimpleNamespace(files=SimpleNamespace(upload=lambda own=uploaded: own))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        reader.run("colab.upload()")
        assert reader.names["own_names"] == [asked]
        assert reader.names["answers"].shape == (1, 10)


def test_later_cells_do_the_same_whenever_they_are_run(reader, capsys):
    """Twice each, and once more in the order in which a reader goes back."""
    state = copy.deepcopy(reader.names["model"])
    printed = {}
    later = list(range(reader.place(SCHEDULE), len(reader.cells)))
    for place in sorted(2 * later) + later[::-1]:
        reader.run_place(place)
        out = capsys.readouterr().out
        assert printed.setdefault(place, out) == out, reader.cells[place]
    assert_same_state(reader.names["model"], state)


def test_the_range_test_leaves_the_trained_network_alone(reader):
    state = copy.deepcopy(reader.names["model"])
    Path(reader.names["folder"], "range_test.csv").unlink()
    reader.run(RANGE_TEST)
    assert_same_state(reader.names["model"], state)


def test_after_a_reconnect_nothing_is_made_again(reader, monkeypatch):
    """Another kernel, the same folder: no step is trained."""
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(training, "train_epoch", never)
    monkeypatch.setattr(optimization, "lr_range_test", never)
    other = Reader(PATH)
    other.run(last=FIT)
    assert other.names["history"] == reader.names["history"]
    assert_same_state(other.names["model"], reader.names["model"])


def test_the_weights_file_is_one_for_the_commands(reader):
    path = reader.names["folder"] / "weights.safetensors"
    model = models.load_weights(path)
    assert (model.metadata["recipe"], model.metadata["width"]) == ("s10", 8)
    assert_same_state(model, reader.names["model"])


@pytest.mark.parametrize("epochs, part", [(0, "steps"), (2, "steps"), (2, "evaluation")])
def test_interrupted_and_run_again_it_ends_as_it_would_have(epochs, part, another_kernel, reader):
    other = another_kernel()
    if part == "steps":
        with cut_off_after(20 * epochs + 5):  # an epoch has 20 steps
            other.run(FIT)
    else:
        calls, predict = itertools.count(), training.predict

        def interrupted(*args, **settings):
            if next(calls) == epochs:
                raise KeyboardInterrupt
            return predict(*args, **settings)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "predict", interrupted)
            other.run(FIT)
    other.run(FIT)
    assert without_times(other.names["history"]) == without_times(reader.names["history"])
    assert_same_state(other.names["model"], reader.names["model"])


def test_a_reconnect_to_another_machine_goes_on_in_its_precision(another_kernel, monkeypatch):
    """From float32 to bfloat16 and back, and a finished run to bfloat16."""
    for epochs, dtype in enumerate([None, torch.bfloat16, None, torch.bfloat16]):
        monkeypatch.setattr(devices, "amp_dtype", lambda device, dtype=dtype: dtype)
        other = another_kernel()
        assert other.names["dtype"] == dtype
        if epochs < 2:
            with cut_off_after(25):  # an epoch has 20 steps
                other.run(FIT)
        else:
            other.run(FIT)
    done = [row["precision"] for row in other.names["history"]]
    assert done == ["float32", "bfloat16", "float32", "float32"]


def test_a_changed_recipe_is_a_run_of_its_own(another_kernel):
    change = "recipe, train = recipe.scaled(epochs=2).replace(cutout=0), True"
    first = assert_a_run_of_its_own(another_kernel, EXERCISE, SETTINGS, FIT, change)
    assert files.read_checkpoint(first / "checkpoint.pt")["identity"]["recipe"]["cutout"] == 8


def test_short_runs_have_the_padding_and_the_cutout_of_the_exercise(another_kernel, monkeypatch):
    other = another_kernel("recipe = recipe.replace(cutout=0, padding=2)")
    tried = []
    row = {"train_acc": 50.0, "test_acc": 40.0}
    monkeypatch.setattr(run, "train_plain", lambda r, *_, **__: (tried.append(r), [row]))
    other.run(SHORT_RUNS)
    assert [(r.cutout, r.padding, r.max_lr) for r in tried] == [
        (0, 1, peak) for peak in (0.003, 0.01, 0.03)
    ]


def test_curves_are_whole_and_a_smoothed_loss_is_called_so(reader):
    other = Reader(PATH)
    other.names |= reader.names
    other.names["recipe"] = reader.names["recipe"].replace(label_smoothing=0.05)
    other.run(LOSSES)
    assert other.names["axes"][0].get_legend().texts[0].get_text().startswith("train (smoothed)")
    other.run(DECAYS)
    for ax, split in zip(other.names["axes"], ["train", "test"], strict=True):
        lowest = min(rows[f"{split}_acc"].min() for rows in other.names["decays"].values())
        assert ax.get_ylim()[0] <= lowest


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 98])
@pytest.mark.parametrize("epochs", [1, 2, 4, 5, 24])
def test_the_schedule_of_short_runs_is_as_planned(steps, epochs):
    reader = Reader(PATH)
    reader.names |= {
        "math": math, "optimization": optimization, "plotting": plotting,
        "train_batches": range(steps), "recipe": recipes.recipe("s10").scaled(epochs=epochs),
    }
    reader.run(SCHEDULE, "wanted = ")


@pytest.mark.parametrize("train", ["", "1"])
def test_another_folder_is_trained_on(train, another_kernel, tmp_path, monkeypatch, capsys):
    """Without a GPU for five epochs, unless it is told to train; never CIFAR-10's results."""
    pictures = write_folder(tmp_path / "pictures", train=20, test=12)
    monkeypatch.setenv("COURSE_DATA", str(pictures))
    monkeypatch.setenv("COURSE_TRAIN", train)
    monkeypatch.setattr(data, "load", lambda source, resize: data.image_folder(source))
    monkeypatch.setattr(notebook, "CPU_EPOCHS", 3)
    other = another_kernel()
    says = "no recorded run on these images: 3 of 4 epochs are trained"
    assert (says in capsys.readouterr().out) == (not train)
    if train:
        other.run(FIT)
    else:
        other.run(SETTINGS, LAST)
    assert [row["epoch"] for row in other.names["history"]] == list(range(1, 5 if train else 4))
    assert other.names["model"].classes == ("blue", "green", "red")
    assert explain.predictions(other.names["model"], other.names["images"]).accuracy == (
        other.names["history"][-1]["test_acc"]
    )
