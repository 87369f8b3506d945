"""What several test files share: folders of pictures, small networks, short commands."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

from utils import data, devices, files, models, recipes, run, training
from utils.data import ImageData
from utils.models import CustomResNet

CPU = torch.device("cpu")
ON_CPU = ["--device", "cpu", "--precision", "fp32"]

settings.register_profile("patient", settings.default, deadline=None)  # machines have other work
settings.load_profile("patient")


def write_folder(root, *, train, test, side=32):
    """Three classes that differ in colour; `train` and `test` pictures of each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(["blue", "green", "red"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 200, (side, side, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 55
                Image.fromarray(pixels).save(root / split / name / f"{i:03}.png")
    return root


def tiny_images(side=8):
    """60 images of three classes, 42 of them for training; a darker spot tells the class."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 256, (60, 3, side, side), dtype=torch.uint8, generator=generator)
    images[torch.arange(60), labels] //= 4
    return ImageData("tiny", ("a", "b", "c"), images[:42], labels[:42], images[42:], labels[42:])


class Small(CustomResNet):
    """Of the same kind, but without its 26 MB and its arithmetic."""

    def __init__(self, num_classes, *, fc_bias=True, width=64):
        nn.Module.__init__(self)
        self.prep = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, num_classes, bias=fc_bias)

    def embed(self, x):
        return self.prep(x).amax(dim=(2, 3))


@pytest.fixture
def small_network(monkeypatch):
    """The recipes' custom_resnet is a `Small`."""
    monkeypatch.setitem(models.MODELS, "custom_resnet", Small)


@pytest.fixture(scope="module")
def small_networks():
    """`small_network` for a whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(run, "save_figures", lambda *_: [])


class CutOffError(Exception):
    """What ends a run in `cut_off_after`."""


@pytest.fixture
def small_files():
    """`with small_files(size)`: no file can be longer, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource", reason="Windows has no limit to files' sizes")

    @contextmanager
    def limited(size):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limited


@contextmanager
def cut_off_after(steps):
    """Both loops raise an error instead of making step number `steps` + 1."""
    left, function = iter(range(steps)), training.loss_and_correct

    def cut_off(*args, **settings):
        if next(left, None) is None:
            raise CutOffError
        return function(*args, **settings)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(training, "loss_and_correct", cut_off)
        yield


@contextmanager
def training_machine(notebook, runs):
    """A CPU that is told to train, a narrow network and few drawn shapes, which it half learns.

    For the notebook of the recipe `notebook`, with the folder `runs` for its runs.
    """
    shapes = data.builtin_sample()
    shapes = replace(
        shapes, name="few shapes", train_images=shapes.train_images[:400],
        train_labels=shapes.train_labels[:400], test_images=shapes.test_images[:150],
        test_labels=shapes.test_labels[:150],
    )
    small = recipes.recipe(notebook).scaled(epochs=4, batch_size=20).replace(width=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", "few-shapes")
        patch.setenv("COURSE_RUNS", str(runs))
        patch.setenv("COURSE_TRAIN", "1")
        patch.setitem(recipes.RECIPES, notebook, small)
        patch.setattr(data, "load", lambda source, **_: shapes)
        patch.setattr(devices, "pick_device", lambda: CPU)
        patch.setattr(devices, "amp_dtype", lambda device: None)
        patch.chdir(Path(__file__).parents[1])
        yield patch


class Reader:
    """Somebody who runs a notebook's code cells, in this process.

    `names`: what the cells have defined. A cell is told by a text that stands in it alone.
    """

    def __init__(self, path):
        cells = nbformat.read(path, as_version=4).cells
        self.cells = [cell.source for cell in cells if cell.cell_type == "code"]
        self.names = {}

    def place(self, text):
        """The cell's position."""
        (place,) = [i for i, source in enumerate(self.cells) if text in source]
        return place

    def edit(self, old, new):
        """Writes `new` in the place of `old`."""
        place = self.place(old)
        self.cells[place] = self.cells[place].replace(old, new)

    def run(self, first=None, last=None):
        """The cells from `first`, or the top, to `last`, or the end; or `first` alone."""
        start = self.place(first) if first else 0
        end = self.place(last or first) if last or first else len(self.cells) - 1
        for place in range(start, end + 1):
            self.run_place(place)

    def run_place(self, place):
        exec(compile(self.cells[place], f"cell {place}", "exec"), self.names)
        plt.close("all")


def assert_a_run_of_its_own(start, exercise, settings, fit, change):
    """A changed recipe, in the kernel of the first run, trains like one in a kernel of its own.

    `start` gives a `Reader`; `exercise`, `settings` and `fit` tell the place of the change, the
    settings' cell and the training's. Returns the folder of the first run.
    """
    again, fresh = start(), start(change)
    again.run(fit)
    first = again.names["folder"]
    again.edit(exercise, f"{change}\n{exercise}")
    again.run(settings)
    again.run(fit)
    fresh.run(fit)
    assert again.names["folder"] == fresh.names["folder"] != first
    assert len(fresh.names["history"]) == 2
    assert_same_state(again.names["model"], fresh.names["model"])
    return first


def read_history(out):
    """The rows of a run's history.csv."""
    return files.read_table(out / "history.csv").to_dict("records")


def without_times(rows):
    return [{k: row[k] for k in row if k not in ("images_per_s", "seconds")} for row in rows]


def assert_same_state(first, second):
    """Two modules: the same parameters and buffers, bit for bit."""
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
