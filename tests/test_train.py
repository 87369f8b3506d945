"""The command line: what a run writes, what it refuses, and a run that was killed."""

import csv
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from utils import data, train, training
from utils.models import CustomResNet, ResNet9
from utils.recipes import RECIPES, recipe
from utils.transforms import channel_statistics

ROOT = Path(__file__).parents[1]
ON_CPU = ["--device", "cpu", "--precision", "fp32"]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures") / "colours", train=8, test=3)


def read_history(out):
    with open(out / "history.csv", newline="") as file:
        return [{name: float(row[name]) for name in row} for row in csv.DictReader(file)]


def without_times(rows):
    return [{k: row[k] for k in row if k not in ("images_per_s", "seconds")} for row in rows]


def without_figures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(train, "save_figures", lambda *_: [])


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train.main(["s10", "--data", str(folder), "--epochs", "1", "--out", str(out), *ON_CPU])
    return out


def test_run_writes_these_files(out):
    names = {path.name for path in out.iterdir()}
    figures = {
        "schedule.png", "loss.png", "accuracy.png", "per_class.png", "confusion.png",
    }
    others = {"checkpoint.pt", "history.csv", "metrics.json", "weights.safetensors"}
    assert names - {"misclassified.png"} == figures | others
    for name in figures:
        with Image.open(out / name) as figure:
            figure.load()
            assert min(figure.size) > 100


def test_metrics(out, folder):
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    images = data.load(str(folder))
    assert metrics["recipe"]["name"] == "s10" and metrics["recipe"]["epochs"] == 1
    assert metrics["recipe"]["batch_size"] == recipe("s10").batch_size
    assert metrics["seed"] == 0
    mean, std = channel_statistics(images.train_images)
    assert metrics["data"] == {
        "name": images.name, "fingerprint": images.fingerprint,
        "mean": mean.tolist(), "std": std.tolist(),
    }
    assert metrics["commit"] == train.current_commit()
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["versions"]["python"] == platform.python_version()
    assert metrics["device"] == training.device_name(torch.device("cpu"))
    assert metrics["precision"] == "float32"
    assert [metrics["last_epoch"]] == read_history(out)
    assert metrics["training_seconds"] == metrics["last_epoch"]["seconds"] > 0


def test_weights_give_the_reported_accuracy(out, folder):
    model = CustomResNet(3)
    model.load_state_dict(load_file(out / "weights.safetensors"))
    images = data.load(str(folder))
    loader = training.make_loaders(recipe("s10"), images, device=torch.device("cpu"))[1]
    loss, accuracy = training.evaluate(model, loader)
    last = read_history(out)[-1]
    assert accuracy == last["test_acc"]
    assert loss == pytest.approx(last["test_loss"], rel=1e-4)


def test_same_seed_same_weights_other_seed_other_weights(out, folder, tmp_path, monkeypatch):
    without_figures(monkeypatch)
    for seed in (0, 1):
        train.main(
            ["s10", "--data", str(folder), "--epochs", "1", "--seed", str(seed),
             "--out", str(tmp_path / str(seed)), *ON_CPU]
        )
    outs = (out, tmp_path / "0", tmp_path / "1")
    first, again, other = ((path / "weights.safetensors").read_bytes() for path in outs)
    assert first == again != other


def test_seed_reaches_the_loader(folder, monkeypatch):
    loaders = []
    monkeypatch.setattr(training, "fit", lambda model, loader, *_, **__: loaders.append(loader))
    train.train(recipe("s10"), data.load(str(folder)), seed=7, device=torch.device("cpu"))
    assert loaders[0].seed == 7


def test_validation_holds_out_training_images(tmp_path, monkeypatch, capsys):
    """The test pictures stay unseen: exchanging them changes nothing."""
    without_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "colours", train=10, test=1)
    arguments = ["s10", "--data", "colours", "--epochs", "1", "--validate", *ON_CPU]
    train.main([*arguments, "--out", "first"])
    assert "27 training and 3 test images" in capsys.readouterr().out
    for path in (tmp_path / "colours/test").rglob("*.png"):
        Image.new("RGB", (32, 32)).save(path)
    train.main([*arguments, "--out", "second"])
    first, second = (tmp_path / name / "weights.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    metrics = json.loads((tmp_path / "first/metrics.json").read_text(encoding="utf-8"))
    assert "held-out" in metrics["data"]["name"]


def test_default_output_folder(folder, tmp_path, monkeypatch):
    without_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    train.main(["s10", "--data", str(folder), "--epochs", "1", "--seed", "7", *ON_CPU])
    assert (tmp_path / "runs" / "s10-colours-seed7" / "metrics.json").exists()


def test_resuming_a_finished_run_changes_no_weights(out, folder, monkeypatch):
    without_figures(monkeypatch)
    before = (out / "weights.safetensors").read_bytes(), read_history(out)
    train.main(
        ["s10", "--data", str(folder), "--epochs", "1", "--out", str(out), "--resume", *ON_CPU]
    )
    assert before == ((out / "weights.safetensors").read_bytes(), read_history(out))


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit(tmp_path, monkeypatch):
    current_commit = train.current_commit.__wrapped__  # asked anew each time
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert current_commit() == ""
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("one")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "a-name")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert current_commit() == commit != ""
    (tmp_path / "train.py").write_text("two")
    assert current_commit() == f"{commit}+"
    monkeypatch.setenv("PATH", "")
    assert current_commit() == ""


def test_model_and_bias_are_the_recipes(folder):
    settings = recipe("s10").changed(["model=resnet9", "fc_bias=False"])
    model = train.new_model(settings, data.load(str(folder)))
    assert type(model) is ResNet9 and model.fc.bias is None and model.fc.out_features == 3


def test_as_published_comes_before_other_changes(folder, tmp_path, monkeypatch):
    seen = []

    def stop(settings, *_, **__):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    with pytest.raises(SystemExit):
        train.main(
            ["resnet9", "--as-published", "--set", "peak_epoch=2", "--epochs", "4",
             "--data", str(folder), "--out", str(tmp_path / "new"), *ON_CPU]
        )
    expected = recipe("resnet9").as_published().changed(["peak_epoch=2"]).scaled(epochs=4)
    assert seen == [expected] and expected.peak_epoch == 1


# What is refused


def refused(arguments, *words):
    """An exit with one line, and a status other than 0, that names what is at fault."""
    with pytest.raises(SystemExit) as caught:
        train.main([str(argument) for argument in arguments])
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and "Traceback" not in message
    assert all(str(word) in message for word in words), message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["s11"], ["'s11'", *RECIPES]),
        (["s10", "--epochs", "0"], ["epochs", "0"]),
        (["s10", "--epochs", "-3"], ["epochs", "-3"]),
        (["s10", "--device", "cuda:99"], ["cuda:99"]),
        (["s10", "--device", "nonsense"], ["nonsense"]),
        (["s10", "--data", "nowhere"], ["nowhere"]),
        (["s10", "--epochs", "1", "--set", "model=resnet"], ["'resnet'", "resnet9"]),
    ],
    ids=" ".join,
)
def test_bad_argument(arguments, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused([*arguments[:1], "--data", folder, "--out", "new", *arguments[1:]], *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", str(2**64)], ["--epochs", "x"]])
def test_argument_of_the_wrong_kind(arguments, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(["s10", "--data", str(folder), *ON_CPU, *arguments])
    assert caught.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_broken_picture(tmp_path):
    write_folder(tmp_path / "colours", train=1, test=1)
    broken = tmp_path / "colours" / "test" / "red" / "000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    refused(["s10", "--data", tmp_path / "colours", "--out", tmp_path / "new"], broken)
    assert not (tmp_path / "new").exists()


def test_too_small_pictures(tmp_path):
    write_folder(tmp_path / "colours", train=1, test=1, side=7)
    refused(["s10", "--data", tmp_path / "colours", "--out", tmp_path / "new"], "7×7")
    assert not (tmp_path / "new").exists()


def test_too_few_pictures_to_hold_some_out(tmp_path):
    write_folder(tmp_path / "colours", train=2, test=1)
    refused(
        ["s10", "--data", tmp_path / "colours", "--epochs", 1, "--out", tmp_path / "new",
         "--validate", *ON_CPU],
        "colours",
    )
    assert not (tmp_path / "new").exists()


def test_file_in_the_place_of_the_output_folder(folder, tmp_path):
    (tmp_path / "new").write_text("mine")
    refused(["s10", "--data", folder, "--epochs", 1, "--out", tmp_path / "new", *ON_CPU], "new")
    assert (tmp_path / "new").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--epochs", 1], "--resume"),
        (["--epochs", 2, "--resume"], "recipe"),
        (["--epochs", 1, "--seed", 1, "--resume"], "seed"),
        (["--epochs", 1, "--validate", "--resume"], "data"),
    ],
    ids=["without --resume", "other epochs", "other seed", "other data"],
)
def test_run_that_is_there_already(out, tmp_path, arguments, word):
    """Ten pictures of each class, as `--validate` needs."""
    folder = write_folder(tmp_path / "colours", train=10, test=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint["identity"]["data"] = data.load(str(folder)).fingerprint
    torch.save(checkpoint, mine / "checkpoint.pt")
    before = (mine / "checkpoint.pt").read_bytes()
    refused(["s10", "--data", folder, "--out", mine, *arguments, *ON_CPU], mine, word)
    assert [path.name for path in mine.iterdir()] == ["checkpoint.pt"]
    assert (mine / "checkpoint.pt").read_bytes() == before


# Real processes


def start(*arguments, **settings):
    command = [sys.executable, "-m", "utils.train", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, encoding="utf-8", **settings)


def test_a_refusal_is_one_line(tmp_path):
    process = start("s10", "--data", tmp_path / "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert process.returncode == 1 and output == ""
    assert len(errors.splitlines()) == 1 and errors.startswith("error: no folder")


def test_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    """On the sample, whose epochs have 25 steps: the kill falls into the second of two."""

    def arguments(out):
        return ["s10", "--data", "sample", "--epochs", 2, "--out", tmp_path / out, *ON_CPU]

    quiet = {"stdout": subprocess.DEVNULL}
    assert start(*arguments("whole"), **quiet).wait() == 0

    killed = start(*arguments("killed"), **quiet)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists() and killed.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    killed.kill()
    assert killed.wait() != 0
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1
    assert not (tmp_path / "killed" / "weights.safetensors").exists()

    assert start(*arguments("killed"), "--resume", **quiet).wait() == 0
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    name = "weights.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert without_times(read_history(whole)) == without_times(read_history(resumed))
    assert {p.name for p in resumed.iterdir()} == {p.name for p in whole.iterdir()}


def test_set_wins_over_the_samples_own_schedule():
    arguments = ["s10", "--data", "sample", "--set", "epochs=2", "--set", "batch_size=16"]
    args = train.parse([*arguments, "--set", "peak_epoch=1"])
    settings = train.fitted(train.settings_of(args), args, data.builtin_sample())
    assert (settings.epochs, settings.batch_size, settings.peak_epoch) == (2, 16, 1)
    args = train.parse(arguments[:3])
    settings = train.fitted(train.settings_of(args), args, data.builtin_sample())
    assert (settings.epochs, settings.batch_size, settings.peak_epoch) == (6, 32, 1.25)


def test_whitening_sees_all_classes():
    """In a folder the images are sorted by class; here only those of the last vary."""
    images = data.ImageData(
        "sorted", ("a", "b"), torch.zeros(12000, 3, 8, 8, dtype=torch.uint8),
        torch.arange(12000) // 6000, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2),
    )
    images.train_images[6000:] = torch.randint(0, 256, (6000, 3, 8, 8), dtype=torch.uint8)
    settings = recipe("s10").changed(["whiten=True"])
    filters = train.new_model(settings, images).prep[0].weight[:27].flatten(1)
    assert filters.norm(dim=1).max() < 5  # of images without variance they would be 10
