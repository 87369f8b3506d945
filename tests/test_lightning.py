"""PyTorch Lightning's loop: the same training, its logs and checkpoints, several processes."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import InputError, data, lightning_loop, sample, train, training, transforms
from utils.recipes import recipe

CPU = torch.device("cpu")
EPOCHS = 3
COMMAND = ["--epochs", str(EPOCHS), "--batch-size", "12", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes: 36 training, 4 validation and 27 test pictures for the recipe s12."""
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    train_images, train_labels, test_images, test_labels = sample.draw_sample(10, 7)
    splits = {"train": (train_images, train_labels), "test": (test_images[:63], test_labels[:63])}
    for split, (images, labels) in splits.items():
        for i in (labels < 4).nonzero().flatten():
            path = folder / split / sample.CLASSES[labels[i]] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return data.with_validation(data.load(folder))


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """The folder of a run that nothing has cut off."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(["s12", "--data", str(folder), "--out", str(out), *COMMAND])
    return out


def run_script(path, text, *arguments):
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, path, *map(str, arguments)], env=environment, timeout=300,
        capture_output=True, text=True,
    )


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    return [{k: row[k] for k in row if k not in ("images_per_s", "seconds")} for row in rows]


def as_after_two_epochs(module, images):
    loaders = training.make_loaders(module.recipe, images, device=CPU)
    return training.predict(module.model, loaders[1])


@pytest.mark.parametrize("name", ["s10", "s10_cpu", "resnet9"])
def test_both_loops_train_the_same(name, images, tmp_path):
    """The weights are equal bit for bit; the figures up to float32's rounding of the sums."""
    settings = recipe(name).scaled(epochs=2, batch_size=16)
    model, _, plain = train.train(settings, images, seed=3, device=CPU)
    module = lightning_loop.Classifier(train.new_model(settings, images, seed=3), settings, 4)
    trainer = lightning_loop.make_trainer(settings, tmp_path, device=CPU, validation=False)
    datamodule = lightning_loop.ImageDataModule(settings, images, seed=3)
    history = lightning_loop.fit(trainer, module, datamodule)

    assert not trainer.interrupted and len(history) == len(plain) == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], tensor), name
    for row, expected in zip(history, plain, strict=True):
        assert row.keys() == expected.keys()
        assert row["lr"] == expected["lr"]
        for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6)

    logits, labels = as_after_two_epochs(module, images)
    matrix = training.confusion_matrix(logits.argmax(1), labels, 4)
    assert torch.equal(module.confusion["test"].compute(), matrix)


def test_gradients_are_clipped_in_mixed_precision(images, tmp_path):
    """Lightning refuses to for a fused optimizer."""
    settings = recipe("resnet9").scaled(epochs=1, batch_size=16)
    how = {"device": CPU, "dtype": torch.bfloat16}
    plain = train.train(settings, images, **how)[0].state_dict()
    lightning = train.train_lightning(settings, images, out=tmp_path, **how)[0].state_dict()
    assert all(torch.equal(lightning[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("clip", [None, 0.1])
def test_only_where_gradients_are_clipped_the_optimizer_is_not_fused(clip):
    """Lightning then takes float16's scale out of them before it clips."""
    settings = replace(recipe("s10"), gradient_clip=clip)
    optimizer = training.make_optimizer(torch.nn.Linear(1, 1), settings)
    assert optimizer.defaults["fused"] == (clip is None)


def test_run_writes_these_files(out):
    names = {path.name for path in out.iterdir()} - {"misclassified.png"}
    figures = {"schedule.png", "loss.png", "accuracy.png", "per_class.png", "confusion.png"}
    tables = {"history.csv", "metrics.json", "weights.safetensors"}
    assert names == figures | tables | {"last.ckpt", "best.ckpt", "csv", "tensorboard"}
    assert [path.name for path in (out / "csv").iterdir()] == ["version_0"]
    assert [int(row["epoch"]) for row in read_csv(out / "history.csv")] == [1, 2, 3]


def test_csv_log_agrees_with_the_history(out):
    log = lightning_loop.read_log(out)
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        history = [float(row[name]) for row in read_csv(out / "history.csv")]
        assert list(log[name].values()) == pytest.approx(history)
        assert list(log[name]) == [2, 5, 8]  # the last step of each epoch
    assert log["val_acc"].keys() == log["test_acc"].keys()


def test_tensorboard_log(out):
    log = EventAccumulator(str(out / "tensorboard"))
    log.Reload()
    tags = log.Tags()
    figures = {"train_loss", "train_acc", "test_loss", "test_acc", "val_loss", "val_acc"}
    assert figures | {"lr", "images_per_s"} <= set(tags["scalars"])
    assert {"confusion", "misclassified"} <= set(tags["images"])
    logged = [event.value for event in log.Scalars("test_loss")]
    history = [float(row["test_loss"]) for row in read_csv(out / "history.csv")]
    assert logged == pytest.approx(history)
    assert [event.step for event in log.Scalars("test_loss")] == [2, 5, 8]


def test_best_checkpoint_is_chosen_on_validation_images(out, images, tmp_path):
    monitors = {}
    for validation in (True, False):
        trainer = lightning_loop.make_trainer(
            recipe("s12"), tmp_path, device=CPU, validation=validation
        )
        callbacks = trainer.checkpoint_callbacks
        monitors[validation] = [callback.monitor for callback in callbacks]
    assert monitors == {True: [None, "val_acc"], False: [None]}

    accuracies = list(lightning_loop.read_log(out)["val_acc"].values())
    best = training.read_checkpoint(out / "best.ckpt", {})
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert training.read_checkpoint(out / "last.ckpt", {})["epoch"] == EPOCHS - 1

    # They are training images which are not trained on, and none of the test images.
    pictures = {
        name: {image.numpy().tobytes() for image in getattr(images, f"{name}_images")}
        for name in ("train", "validation", "test")
    }
    assert [len(pictures[name]) for name in pictures] == [36, 4, 27]
    assert len(set.union(*pictures.values())) == 36 + 4 + 27


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_run_resumes_as_if_nothing_had_been(folder, out, tmp_path, monkeypatch):
    """SIGKILL in the middle of the second epoch."""
    script = """
import os, signal, sys
from utils import lightning_loop, train

class Killed(lightning_loop.Classifier):
    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

lightning_loop.Classifier = Killed
train.main(sys.argv[1:])
"""
    command = ["s12", "--data", str(folder), "--out", str(tmp_path / "killed"), *COMMAND]
    process = run_script(tmp_path / "killed.py", script, *command)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "killed" / "history.csv").exists()

    monkeypatch.setattr(train, "save_figures", lambda *_: [])  # to save time
    train.main([*command, "--resume"])
    weights = load_file(tmp_path / "killed" / "weights.safetensors")
    for name, tensor in load_file(out / "weights.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    resumed, whole = (
        without_times(read_csv(path / "history.csv")) for path in (tmp_path / "killed", out)
    )
    assert resumed == whole
    logs = [lightning_loop.read_log(path)["test_loss"] for path in (tmp_path / "killed", out)]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "killed").glob("*.part"))

    finished = tmp_path / "killed" / "last.ckpt"
    before = finished.read_bytes()
    train.main([*command, "--resume"])  # nothing is left to do
    assert finished.read_bytes() == before
    assert without_times(read_csv(tmp_path / "killed" / "history.csv")) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="gloo needs the host's name resolved")
def test_two_processes(folder, images, tmp_path):
    script = """
import sys, torch
from utils import lightning_loop, train

class Watched(lightning_loop.Classifier):
    shards = []

    def on_train_epoch_end(self):
        self.shards.append(list(self.trainer.train_dataloader.sampler))

    def on_train_end(self):
        images = torch.full((4, 3, 32, 32), 99, dtype=torch.uint8)
        torch.save({
            "shards": self.shards,
            "batch": self.trainer.train_dataloader.batch_size,
            "weights": self.model.state_dict(),
            "draws": self.trainer.datamodule.augment(images),
        }, f"{sys.argv[0]}.{self.global_rank}")

lightning_loop.Classifier = Watched
train.save_figures = lambda *_: []
train.main(sys.argv[1:])
"""
    out = tmp_path / "two"
    process = run_script(
        tmp_path / "watched.py", script, "s12", "--data", folder, "--out", out, *COMMAND,
        "--devices", 2, "--epochs", 2,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout.count("epoch        lr") == 1  # only one of them speaks

    first, second = (
        torch.load(tmp_path / f"watched.py.{rank}", weights_only=True) for rank in (0, 1)
    )
    assert first["batch"] == second["batch"] == 6  # of the recipe's 12
    for one, other in zip(first["shards"], second["shards"], strict=True):
        assert sorted(one + other) == list(range(36))
    assert len(first["shards"]) == 2 and first["shards"][0] != first["shards"][1]
    assert not torch.equal(first["draws"], second["draws"])

    saved = load_file(out / "weights.safetensors")
    for name, tensor in first["weights"].items():
        assert torch.equal(second["weights"][name], tensor), name
        assert torch.equal(saved[name], tensor), name

    # 27 test images in two processes: one more here than there, and none of them twice.
    settings = recipe("s12").scaled(batch_size=12)
    model = train.new_model(settings, images)
    model.load_state_dict(saved)
    _, test_loader = training.make_loaders(settings, images, device=CPU)
    loss, accuracy = training.evaluate(model, test_loader)
    last = read_csv(out / "history.csv")[-1]
    assert float(last["test_acc"]) == pytest.approx(accuracy, rel=1e-6)
    assert float(last["test_loss"]) == pytest.approx(loss, rel=1e-4)
    assert len(list((out / "csv").iterdir())) == 1


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_image_is_evaluated_once(images, processes):
    counted = {"test": [], "val": []}
    for rank in range(processes):
        datamodule = lightning_loop.ImageDataModule(recipe("s12"), images)
        datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
        for name, loader in zip(counted, datamodule.val_dataloader(), strict=True):
            counted[name] += [image.numpy().tobytes() for batch, _ in loader for image in batch]
    for name, expected in (("test", images.test_images), ("val", images.validation_images)):
        assert sorted(counted[name]) == sorted(image.numpy().tobytes() for image in expected)


def test_batch_that_can_not_be_shared(images):
    datamodule = lightning_loop.ImageDataModule(recipe("s12"), images)
    datamodule.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(InputError, match="multiple of 3"):
        datamodule.train_dataloader()


def test_albumentations_under_lightning(images, tmp_path):
    settings = replace(recipe("s12").scaled(epochs=1, batch_size=16), per_image=True)
    module = lightning_loop.Classifier(train.new_model(settings, images), settings, 4)
    trainer = lightning_loop.make_trainer(settings, tmp_path, device=CPU)
    trainer.limit_train_batches = 1
    history = lightning_loop.fit(
        trainer, module, lightning_loop.ImageDataModule(settings, images)
    )
    assert len(history) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["s10", "--devices", "2"], "--loop lightning"),
        (["s12", "--strategy", "nonsense"], "strategy"),
        (["s12", "--max-lr", "-1"], "max_lr"),
    ],
)
def test_bad_argument(folder, tmp_path, arguments, words):
    with pytest.raises(SystemExit) as caught:
        train.main([*arguments, "--data", str(folder), "--out", str(tmp_path / "new"), *COMMAND])
    assert caught.value.code.startswith("error: ") and words in caught.value.code
    assert "\n" not in caught.value.code
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--resume"),
        (["--resume", "--seed", "1"], "seed"),
        (["--resume", "--loop", "plain"], "--loop lightning"),
    ],
)
def test_folder_of_another_run(folder, out, arguments, words):
    with pytest.raises(SystemExit, match=words):
        train.main(["s12", "--data", str(folder), "--out", str(out), *COMMAND, *arguments])


def test_damaged_checkpoint(folder, out, tmp_path):
    damaged = tmp_path / "last.ckpt"
    damaged.write_bytes((out / "last.ckpt").read_bytes()[:10_000])
    with pytest.raises(SystemExit, match="last.ckpt is damaged"):
        train.main(["s12", "--data", str(folder), "--out", str(tmp_path), *COMMAND, "--resume"])


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_text("old")

    def full_disk(checkpoint, part):
        Path(part).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        lightning_loop.WholeFileIO().save_checkpoint({}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def smooth_picture(height=32, width=32):
    """uint8 (1, 3, height, width), without edges."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + y / 9), np.cos(y / 6), np.sin(x / 11 - y / 7)])
    return torch.from_numpy((127 + 100 * waves).round().astype(np.uint8))[None]


@pytest.mark.parametrize("size", [(32, 32), (40, 32)])
@pytest.mark.parametrize("degrees", [-20, -5, 0, 7, 90])
def test_rotation_agrees_with_albumentations(degrees, size, monkeypatch):
    """Same sign, centre and border; its result is rounded to whole numbers."""
    image = smooth_picture(*size)
    pipeline = transforms.albumentations_pipeline(
        (0, 0, 0), (1, 1, 1), size=size, padding=0, flip=0, rotation=1, cutout=0
    )
    turn = next(step for step in pipeline.transforms if type(step).__name__ == "Rotate")
    turn.limit = (degrees, degrees)
    expected = 255 * pipeline(image=image[0].permute(1, 2, 0).numpy())["image"]
    rotated = transforms.rotate(image.float(), torch.tensor([float(degrees)]))[0]
    assert (rotated - expected).abs().max() < 0.6


def test_rotation_is_anticlockwise_about_the_centre():
    image = torch.zeros(1, 1, 33, 33)
    image[..., 16, 26] = 255  # right of the centre
    rotated = transforms.rotate(image, torch.tensor([90.0]))
    assert rotated.argmax() == 6 * 33 + 16  # above it
    assert rotated.sum() == pytest.approx(255, abs=1e-2)


def test_random_rotation_draws_an_angle_for_each_image():
    images = smooth_picture().float().expand(200, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    rotated = transforms.random_rotation(images, 5, generator)
    assert len({image.numpy().tobytes() for image in rotated}) == 200
    corner = images[0, :, 0, 0] - rotated[:, :, 0, 0]
    assert (corner > 0).any(dim=1).all()  # black comes in
    angles = transforms._draw_around_zero(5, images, torch.Generator().manual_seed(0))
    assert torch.equal(rotated, transforms.rotate(images, angles))
    assert angles.abs().max() <= 5 and angles.min() < -4 and angles.max() > 4


def test_brightness_is_a_factor_of_each_image():
    images = torch.full((300, 3, 32, 32), 100.0)
    images[:, :, :4] = 0
    changed = transforms.random_brightness(images, 0.2, torch.Generator().manual_seed(0))
    assert (changed[:, :, :4] == 0).all()  # black stays black
    factors = changed[:, :, 4:].flatten(1) / 100
    assert torch.equal(factors.amin(1), factors.amax(1))  # one for all its pixels
    assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2
    assert transforms.random_brightness(torch.full((50, 3, 2, 2), 250.0), 0.2).max() <= 255


@pytest.mark.parametrize("kind", ["batched", "per image"])
def test_brightness_of_a_pipeline(kind):
    settings = {"padding": 0, "flip": 0, "cutout": 0, "brightness": 0.2}
    grey = torch.full((200, 3, 32, 32), 100, dtype=torch.uint8)
    if kind == "batched":
        changed = transforms.BatchTransform((0, 0, 0), (1, 1, 1), **settings)(grey)
    else:
        pipeline = transforms.albumentations_pipeline((0, 0, 0), (1, 1, 1), **settings)
        array = grey[0].permute(1, 2, 0).numpy()
        changed = torch.stack([pipeline(image=array)["image"] for _ in range(200)])
    levels = 255 * changed[:, 0, 0, 0]
    assert 79 <= levels.min() < 83 and 117 < levels.max() <= 120.1


def test_other_recipes_keep_their_draws():
    """Crop, flip and cutout draw as they did before there was a rotation."""
    images = sample.draw_sample(2, 1)[0]
    transform = transforms.BatchTransform((0.5,) * 3, (0.25,) * 3)
    transform.seed(4)
    generator = torch.Generator().manual_seed(4)
    expected = transforms.random_crop(images, 4, generator)
    expected = transforms.random_flip(expected, 0.5, generator)
    expected = transforms.cutout(transform.normalize(expected), 8, generator)
    assert torch.equal(transform(images), expected)


def test_new_fields_leave_the_identity_of_old_recipes_alone():
    new = {"rotation", "brightness", "held_out", "loop"}
    assert not new & recipe("s10").identity().keys()
    assert new <= recipe("s12").identity().keys()
