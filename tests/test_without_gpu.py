"""The notebooks as most people run them: no GPU, so what is recorded is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import CPU, Reader
from utils import data, devices, explain, files, models, notebook
from utils.maintenance import benchmark
from utils.results import read_predictions

ROOT = Path(__file__).parents[1]
PHASES = {"input": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5}


def s10_images(model):
    """Drawn shapes, called what the network takes them for, except for one in 15."""
    shapes = data.builtin_sample()
    labels = explain.probabilities(model, shapes.test_images).argmax(1)
    labels[::15] = (labels[::15] + 1) % 10
    return replace(shapes, test_labels=labels)


def s12_images(_):
    """As many as in CIFAR-10; the recorded predictions are of its test images, by class."""
    shapes = data.builtin_sample()
    labels = read_predictions(files.IMAGES / "s12" / "predictions.safetensors").labels
    number = torch.arange(50_000)
    return replace(
        shapes, train_images=shapes.train_images[number % 800], train_labels=number % 10,
        test_images=shapes.test_images[number[:10_000] % 400], test_labels=labels,
    )


@pytest.mark.parametrize("name, path, images", [
    ("s10", "S10_custom_resnet.ipynb", s10_images), ("s12", "S12_lightning.ipynb", s12_images),
])
def test_without_a_gpu_the_recorded_run_is_told(name, path, images, monkeypatch, capsys):
    model = models.pretrained(name)
    images = replace(images(model), name="CIFAR-10", classes=tuple(model.classes))
    statistics = torch.tensor([model.mean, model.std], dtype=torch.float64)
    monkeypatch.setattr(data.ImageData, "statistics", tuple(statistics))
    monkeypatch.setattr(data, "load", lambda source, **_: images)
    monkeypatch.setattr(devices, "pick_device", lambda: CPU)
    monkeypatch.setattr(
        benchmark, "own_process", lambda *_, **__: {phase: [PHASES[phase]] for phase in PHASES}
    )
    for variable in ("COURSE_TRAIN", "COURSE_RESIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COURSE_DATA", "cifar10")
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime for path in files.IMAGES.rglob("*")}
    assert notebook.is_recorded(name, images)

    reader = Reader(ROOT / path)
    reader.run()
    names = reader.names
    assert f"what takes hours is read from images/{name}" in capsys.readouterr().out
    assert not names["train"] and names["folder"] == files.IMAGES / name
    assert names["history"] == files.read_table(
        files.IMAGES / name / "history_seed0.csv").to_dict("records")
    assert names["results"].accuracy == pytest.approx(names["history"][-1]["test_acc"], abs=0.5)
    assert {path: path.stat().st_mtime for path in files.IMAGES.rglob("*")} == before
